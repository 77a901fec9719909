//! The Python face. See `lattica/_native.pyi`.

mod mux;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::draft::Drafter;
use crate::noise::Place;
use crate::row::RowError;
use crate::sample::Warp;
use crate::walk::{Tree, WalkError};

impl From<WalkError> for PyErr {
    fn from(error: WalkError) -> PyErr {
        PyValueError::new_err(match error {
            WalkError::Tree(text) | WalkError::Argument(text) => text,
            WalkError::Row { node, error } => {
                let why = match error {
                    RowError::NotANumber => "holds NaN",
                    RowError::PlusInfinity => "holds +inf",
                    RowError::AllMasked => "masks every token (all are -inf)",
                };
                format!("the row of node {node} {why}")
            }
        })
    }
}

#[pymodule]
mod _native {
    use super::*;

    #[pymodule_export]
    use super::mux::{Mux, WindowBudget};

    #[pyfunction]
    #[pyo3(signature = (tokens, parents, rows, *, position, seed, temperature, top_k, top_p, logprobs))]
    #[allow(clippy::too_many_arguments)] // the names are the interface
    fn walk(
        py: Python<'_>,
        tokens: Vec<u32>,
        parents: Vec<i64>,
        rows: &Bound<'_, PyAny>,
        position: u64,
        seed: u64,
        temperature: f64,
        top_k: u64,
        top_p: f64,
        logprobs: bool,
    ) -> PyResult<(Vec<u32>, Vec<u32>, Vec<f32>)> {
        let buffer = PyBuffer::<f32>::get(rows)
            .map_err(|error| PyValueError::new_err(format!("rows are no buffer of float32: {error}")))?;
        let &[_, vocabulary] = buffer.shape() else {
            return Err(PyValueError::new_err(format!(
                "rows have shape {:?}, not [nodes, vocabulary]",
                buffer.shape()
            )));
        };
        if !buffer.is_c_contiguous() {
            return Err(PyValueError::new_err("rows are not C-contiguous"));
        }
        let count = buffer.item_count();
        let values: &[f32] = if count == 0 {
            &[]
        } else {
            // SAFETY: the buffer is typed f32 (hence aligned), C-contiguous and of `count` items, and `buffer` keeps it
            // alive and unmoved until this function ends. Nobody may write to it meanwhile: the caller's promise,
            // written down in the .pyi, as for every routine that computes on an array without the GIL.
            unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast::<f32>(), count) }
        };
        let verdict = py.detach(|| {
            let tree = Tree::new(&tokens, &parents, vocabulary)?;
            let warp = Warp {
                temperature,
                top_k,
                top_p,
            };
            crate::walk::walk(&tree, values, vocabulary, Place { seed, position }, warp, logprobs)
        })?;
        Ok((verdict.tokens, verdict.path, verdict.logprobs))
    }

    // A literal below, so that Python's help shows it.
    const _: () = assert!(crate::draft::MAX_TOKENS == 65536);

    #[pyclass]
    struct SuffixAutomaton(Drafter);

    #[pymethods]
    impl SuffixAutomaton {
        #[new]
        #[pyo3(signature = (max_tokens = 65536))]
        fn new(max_tokens: usize) -> PyResult<Self> {
            if !(2..=crate::draft::MAX_TOKENS).contains(&max_tokens) {
                return Err(PyValueError::new_err(format!(
                    "max_tokens is {max_tokens}; it is 2 to {}",
                    crate::draft::MAX_TOKENS
                )));
            }
            Ok(SuffixAutomaton(Drafter::new(max_tokens)))
        }

        fn extend(&mut self, py: Python<'_>, tokens: Vec<u32>) {
            py.detach(|| self.0.extend(&tokens));
        }

        fn draft(&self, py: Python<'_>, budget: usize) -> PyResult<(Vec<u32>, Vec<i64>, Vec<f64>)> {
            let draft = py.detach(|| self.0.draft(budget));
            if draft.tokens.is_empty() {
                return Err(PyValueError::new_err("no token yet: a tree's node 0 is the last one"));
            }
            Ok((draft.tokens, draft.parents, draft.scores))
        }
    }

    /// Gumbel noise of one token, for tests: the walk never leaves Rust.
    #[pyfunction]
    fn gumbel(seed: u64, position: u64, token: u32) -> f64 {
        crate::noise::gumbel(Place { seed, position }, token)
    }
}
