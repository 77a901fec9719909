package main

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
)

const chunkBytes = 64 << 10

// patternBlock repeats in what bulk commands send; its length is a prime, so that a lost or doubled chunk shows.
var patternBlock = func() []byte {
	block := make([]byte, 65_521)
	for i := range block {
		block[i] = byte(i*167 + i>>8)
	}
	return block
}()

type pattern struct{ offset int }

func (p *pattern) Read(buffer []byte) (int, error) {
	n := copy(buffer, patternBlock[p.offset:])
	p.offset = (p.offset + n) % len(patternBlock)
	return n, nil
}

// The serving ends

func echo(stream network.Stream) {
	if _, err := io.CopyBuffer(onlyWriter{stream}, onlyReader{stream}, make([]byte, chunkBytes)); err != nil {
		_ = stream.Reset()
		return
	}
	_ = stream.Close()
}

// sink answers with the SHA-256 of everything that it has read to the end.
func sink(stream network.Stream) {
	sum := sha256.New()
	if _, err := io.CopyBuffer(sum, onlyReader{stream}, make([]byte, chunkBytes)); err != nil {
		_ = stream.Reset()
		return
	}
	_, _ = stream.Write(sum.Sum(nil))
	_ = stream.Close()
}

// source answers a big-endian 64-bit number with as many bytes of the pattern.
func source(stream network.Stream) {
	var size int64
	if err := binary.Read(stream, binary.BigEndian, &size); err != nil {
		_ = stream.Reset()
		return
	}
	if _, err := io.CopyBuffer(onlyWriter{stream}, io.LimitReader(new(pattern), size), make([]byte, chunkBytes)); err != nil {
		_ = stream.Reset()
		return
	}
	_ = stream.Close()
}

// The asking ends

func echoed(stream network.Stream, size int64) (any, error) {
	start := time.Now()
	sent, received := sha256.New(), sha256.New()
	written := make(chan error, 1)
	go func() {
		_, err := io.CopyBuffer(io.MultiWriter(stream, sent), io.LimitReader(new(pattern), size), make([]byte, chunkBytes))
		written <- errors.Join(err, stream.CloseWrite())
	}()
	n, err := io.CopyBuffer(received, onlyReader{stream}, make([]byte, chunkBytes))
	if err := errors.Join(err, <-written); err != nil {
		return nil, err
	}
	return map[string]any{
		"sent":     hex.EncodeToString(sent.Sum(nil)),
		"received": hex.EncodeToString(received.Sum(nil)),
		"bytes":    n,
		"seconds":  time.Since(start).Seconds(),
	}, nil
}

func sunk(stream network.Stream, size int64) (any, error) {
	sent := sha256.New()
	from := io.LimitReader(new(pattern), size)
	if _, err := io.CopyBuffer(io.MultiWriter(stream, sent), from, make([]byte, chunkBytes)); err != nil {
		return nil, err
	}
	if err := stream.CloseWrite(); err != nil {
		return nil, err
	}
	answer, err := io.ReadAll(stream)
	return map[string]any{"sent": hex.EncodeToString(sent.Sum(nil)), "received": hex.EncodeToString(answer)}, err
}

func sourced(stream network.Stream, size int64) (any, error) {
	if err := binary.Write(stream, binary.BigEndian, size); err != nil {
		return nil, err
	}
	received := sha256.New()
	n, err := io.CopyBuffer(received, onlyReader{stream}, make([]byte, chunkBytes))
	return map[string]any{"received": hex.EncodeToString(received.Sum(nil)), "bytes": n}, err
}

// io.CopyBuffer would pass its buffer by for a reader or writer with a faster way of its own.
type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)
