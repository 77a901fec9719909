//! The Python face of the mux.

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::import_exception;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::mux::{Budget, Error, Event, Source};

import_exception!(lattica.errors, LocalProtocolError);
import_exception!(lattica.errors, RemoteProtocolError);
import_exception!(lattica.errors, StreamError);

/// Sealing or opening less than this takes about as long as giving the GIL away and getting it back under load.
const DETACH_BYTES: usize = 64 * 1024;

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        match error {
            Error::Remote(why) => RemoteProtocolError::new_err(why),
            Error::Local(why) => LocalProtocolError::new_err(why),
            Error::Stream(why) => StreamError::new_err(why),
        }
    }
}

/// Memory of Python that this thread may read while it holds the GIL; others may write to it, so it is only copied.
struct Memory<'a> {
    bytes: NonNull<[u8]>,
    owner: PhantomData<&'a PyBuffer<u8>>,
}

impl Source for Memory<'_> {
    fn len(&self) -> usize {
        self.bytes.len()
    }

    fn append_to(&self, size: usize, target: &mut Vec<u8>) {
        let (size, end) = (size.min(self.len()), target.len());
        target.reserve(size);
        // SAFETY: `owner` keeps the memory alive and unmoved, it is at least `size` bytes long, `target` has room for
        // as many, and nothing of Rust's lies in a Python object's memory.
        unsafe {
            std::ptr::copy_nonoverlapping(self.bytes.cast::<u8>().as_ptr(), target.as_mut_ptr().add(end), size);
            target.set_len(end + size);
        }
    }
}

fn contiguous(buffer: &PyBuffer<u8>) -> PyResult<NonNull<[u8]>> {
    (buffer.as_slice_ptr()).ok_or_else(|| PyValueError::new_err("the bytes are not contiguous"))
}

/// `bytes`, or the buffer of anything else that holds contiguous bytes.
enum Data<'py> {
    Bytes(Bound<'py, PyBytes>),
    Buffer(PyBuffer<u8>),
}

impl<'py> Data<'py> {
    fn new(object: &Bound<'py, PyAny>) -> PyResult<Self> {
        match object.cast::<PyBytes>() {
            Ok(bytes) => Ok(Data::Bytes(bytes.clone())),
            Err(_) => PyBuffer::get(object).map(Data::Buffer),
        }
    }

    fn piece(&self) -> PyResult<Piece<'_>> {
        Ok(match self {
            Data::Bytes(bytes) => Piece::Slice(bytes.as_bytes()),
            Data::Buffer(buffer) => Piece::Memory(Memory {
                bytes: contiguous(buffer)?,
                owner: PhantomData,
            }),
        })
    }
}

enum Piece<'a> {
    Slice(&'a [u8]),
    Memory(Memory<'a>),
}

impl Source for Piece<'_> {
    fn len(&self) -> usize {
        match self {
            Piece::Slice(slice) => slice.len(),
            Piece::Memory(memory) => memory.len(),
        }
    }

    fn append_to(&self, size: usize, target: &mut Vec<u8>) {
        match self {
            Piece::Slice(slice) => slice.append_to(size, target),
            Piece::Memory(memory) => memory.append_to(size, target),
        }
    }
}

/// Kind, stream and value, as `lattica/net/yamux.py` numbers them.
fn numbered(events: Vec<Event>) -> Vec<(u8, u32, u64)> {
    events
        .into_iter()
        .map(|event| match event {
            Event::Opened(stream) => (0, stream, 0),
            Event::Readable(stream) => (1, stream, 0),
            Event::Ended(stream) => (2, stream, 0),
            Event::Reset { stream, by_us } => (3, stream, u64::from(by_us)),
            Event::Writable(stream) => (4, stream, 0),
            Event::WentAway(code) => (5, 0, u64::from(code)),
            Event::Pong(microseconds) => (6, 0, microseconds),
        })
        .collect()
}

#[pyclass(frozen)]
pub struct WindowBudget(Arc<Budget>);

#[pymethods]
impl WindowBudget {
    #[new]
    fn new(limit_bytes: u64) -> Self {
        WindowBudget(Arc::new(Budget::new(limit_bytes)))
    }

    #[getter]
    fn limit(&self) -> u64 {
        self.0.limit
    }

    #[getter]
    fn used(&self) -> u64 {
        self.0.used()
    }
}

#[pyclass]
pub struct Mux(crate::mux::Mux);

#[pymethods]
impl Mux {
    #[new]
    #[pyo3(signature = (*, initiator, send_key, receive_key, windows))]
    fn new(initiator: bool, send_key: &[u8], receive_key: &[u8], windows: &WindowBudget) -> PyResult<Self> {
        let windows = Arc::clone(&windows.0);
        Ok(Mux(crate::mux::Mux::new(initiator, send_key, receive_key, windows)?))
    }

    #[getter]
    fn output_bytes(&self) -> usize {
        self.0.yamux.output_bytes()
    }

    #[getter]
    fn rtt(&self) -> Option<f64> {
        self.0.yamux.rtt
    }

    #[getter]
    fn gone(&self) -> bool {
        self.0.yamux.gone
    }

    #[getter]
    fn unread_bytes(&self) -> usize {
        self.0.yamux.unread_bytes
    }

    #[getter]
    fn inbound_streams(&self) -> usize {
        self.0.yamux.inbound_streams
    }

    fn seal<'py>(&mut self, py: Python<'py>, data: &Bound<'_, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let (data, mut plain) = (Data::new(data)?, Vec::new());
        let piece = data.piece()?;
        piece.append_to(piece.len(), &mut plain);
        Ok(PyBytes::new(py, &self.0.seal(&plain)?))
    }

    fn open<'py>(&mut self, py: Python<'py>, data: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.0.open(data)?))
    }

    fn start(&mut self, early: &[u8]) -> PyResult<Vec<(u8, u32, u64)>> {
        Ok(numbered(self.0.start(early)?))
    }

    fn receive(&mut self, py: Python<'_>, data: &[u8], now: f64) -> PyResult<Vec<(u8, u32, u64)>> {
        let events = if data.len() > DETACH_BYTES {
            py.detach(|| self.0.receive(data, now))
        } else {
            self.0.receive(data, now)
        };
        Ok(numbered(events?))
    }

    fn open_stream(&mut self) -> PyResult<u32> {
        Ok(self.0.yamux.open()?)
    }

    fn send(&mut self, stream: u32, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        Ok(self.0.yamux.send(stream, &Data::new(data)?.piece()?)?)
    }

    fn send_all_or_nothing(&mut self, stream: u32, parts: Vec<Bound<'_, PyAny>>) -> PyResult<bool> {
        let parts = parts.iter().map(Data::new).collect::<PyResult<Vec<_>>>()?;
        let pieces = parts.iter().map(Data::piece).collect::<PyResult<Vec<_>>>()?;
        Ok(self.0.yamux.send_all_or_nothing(stream, &pieces)?)
    }

    fn end(&mut self, stream: u32) -> PyResult<()> {
        Ok(self.0.yamux.end(stream)?)
    }

    fn reset(&mut self, stream: u32) {
        self.0.yamux.reset(stream);
    }

    fn read<'py>(&mut self, py: Python<'py>, stream: u32, max_bytes: usize) -> Bound<'py, PyBytes> {
        self.0.yamux.read(stream, max_bytes, |data| PyBytes::new(py, data))
    }

    fn read_into(&mut self, stream: u32, buffer: &Bound<'_, PyAny>) -> PyResult<usize> {
        let buffer = PyBuffer::<u8>::get(buffer)?;
        let target = contiguous(&buffer)?;
        if buffer.readonly() {
            return Err(PyValueError::new_err("the buffer cannot be written to"));
        }
        Ok(self.0.yamux.read(stream, target.len(), |data| {
            // SAFETY: `buffer` keeps the memory alive, unmoved and writable, `data` is at most as long and is ours, and
            // nothing of Rust's lies in a Python object's memory.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), target.cast::<u8>().as_ptr(), data.len()) };
            data.len()
        }))
    }

    fn available(&self, stream: u32) -> usize {
        self.0.yamux.available(stream)
    }

    fn discard(&mut self, stream: u32) {
        self.0.yamux.discard(stream);
    }

    fn ping(&mut self, now: f64) {
        self.0.yamux.ping(now);
    }

    #[pyo3(signature = (code = 0))]
    fn go_away(&mut self, code: u32) {
        self.0.yamux.go_away(code);
    }

    fn take_output<'py>(
        &mut self,
        py: Python<'py>,
        max_bytes: usize,
    ) -> PyResult<(Bound<'py, PyBytes>, Vec<u32>)> {
        let waiting = self.0.yamux.output_bytes().min(max_bytes);
        let mut output = Vec::new();
        let writable = if waiting > DETACH_BYTES {
            py.detach(|| self.0.take_output(max_bytes, &mut output))
        } else {
            self.0.take_output(max_bytes, &mut output)
        };
        let writable = writable?;
        Ok((PyBytes::new(py, &output), writable))
    }
}
