package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"sync"
)

// A Driver reads requests, one JSON object a line, and answers each when its command returns: many run at once.
type Driver struct {
	in       *bufio.Scanner
	commands map[string]command
	mu       sync.Mutex // one line at a time
	out      *json.Encoder
}

const maxRequestBytes = 16 << 20

type command func(arguments json.RawMessage) (any, error)

func NewDriver(in io.Reader, out io.Writer) *Driver {
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, maxRequestBytes)
	return &Driver{in: lines, commands: map[string]command{}, out: json.NewEncoder(out)}
}

// Handle gives a name to a function; its argument is filled from the fields of the request.
func Handle[Arguments any](d *Driver, name string, act func(Arguments) (any, error)) {
	d.commands[name] = func(raw json.RawMessage) (any, error) {
		var arguments Arguments
		if err := json.Unmarshal(raw, &arguments); err != nil {
			return nil, err
		}
		return act(arguments)
	}
}

// Emit reports something that nobody asked for.
func (d *Driver) Emit(event string, fields map[string]any) {
	fields["event"] = event
	d.write(fields)
}

// Run obeys until stdin ends.
func (d *Driver) Run() error {
	for d.in.Scan() {
		line := append(json.RawMessage(nil), d.in.Bytes()...)
		var request struct {
			ID int    `json:"id"`
			Do string `json:"do"`
		}
		if err := json.Unmarshal(line, &request); err != nil {
			return fmt.Errorf("request %q: %w", line, err)
		}
		go func() {
			result, err := d.obey(request.Do, line)
			if err != nil {
				d.write(map[string]any{"id": request.ID, "error": err.Error()})
				return
			}
			d.write(map[string]any{"id": request.ID, "result": result})
		}()
	}
	return d.in.Err()
}

func (d *Driver) obey(name string, line json.RawMessage) (any, error) {
	act, known := d.commands[name]
	if !known {
		return nil, fmt.Errorf("unknown command %q", name)
	}
	return act(line)
}

func (d *Driver) write(line any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	_ = d.out.Encode(line) // stdout is gone when the test is over
}
