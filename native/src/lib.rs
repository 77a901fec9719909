//! The Python face of the native parts; see `lattica/_native.pyi`.
use pyo3::prelude::*;

#[pymodule]
mod _native {}
