//! The native parts: seeded noise, the walk down a draft tree, the suffix automaton, the mux of a connection.
//!
//! The modules know no Python. `python` is the shim: it checks buffers, releases the GIL and maps errors; what Python
//! sees is described in `lattica/_native.pyi`.

pub mod automaton;
pub mod draft;
pub mod math;
pub mod mux;
pub mod noise;
pub mod row;
pub mod sample;
mod simd;
pub mod walk;

// A test binary of an extension module has no Python to link against, and the modules above need none.
#[cfg(not(test))]
mod python;
