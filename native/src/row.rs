//! One row of logits: its block maxima in one pass, its argmax, sums of exponentials in a fixed order.

use crate::math::exp;
use crate::noise::BLOCK;
use crate::simd::dispatched;

/// Why a row cannot be sampled from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowError {
    NotANumber,
    PlusInfinity,
    AllMasked,
}

/// Floats that the maximum runs over side by side: four vectors of eight.
const LANES: usize = 32;

/// Tokens a greedy scan takes at once: few maxima to reduce, and a second look at one chunk stays in the L1 cache.
const GREEDY_CHUNK: usize = 4096;

#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if a > b {
        a
    } else {
        b
    }
}

#[inline(always)]
fn scan_body(row: &[f32], chunk: usize, maxima: &mut [f32]) -> bool {
    // The sum carries a NaN to the end for one addition a value, where a comparison would need two steps. It also turns
    // NaN by infinities of both signs or by overflow: so it only asks for a second, exact look.
    let mut sums = [0.0f32; LANES];
    for (chunk, out) in row.chunks(chunk).zip(maxima) {
        let mut best = [f32::NEG_INFINITY; LANES];
        let (whole, rest) = chunk.as_chunks::<LANES>();
        for values in whole {
            for i in 0..LANES {
                best[i] = greater(values[i], best[i]);
                sums[i] += values[i];
            }
        }
        for (i, value) in rest.iter().enumerate() {
            best[i] = greater(*value, best[i]);
            sums[i] += *value;
        }
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                best[i] = greater(best[i + width], best[i]);
            }
            width /= 2;
        }
        *out = best[0];
    }
    sums.iter().any(|sum| sum.is_nan()) && row.iter().any(|value| value.is_nan())
}

dispatched! {
    /// The maximum of each `chunk` values of `row` into `maxima`; true if any value is NaN.
    pub fn scan = scan_body(row: &[f32], chunk: usize, maxima: &mut [f32]) -> bool
}

/// A block's logits, filled up with masked tokens.
#[inline(always)]
pub fn padded(block: &[f32]) -> [f32; BLOCK] {
    let mut logits = [f32::NEG_INFINITY; BLOCK];
    logits[..block.len()].copy_from_slice(block);
    logits
}

#[inline(always)]
fn exp_sum_body(row: &[f32], keep: Keep, max: f32, temperature: f64, sums: &mut [f64]) {
    for ((number, block), out) in row.chunks(BLOCK).enumerate().zip(sums.iter_mut()) {
        let logits = padded(block);
        let mut terms = [0.0; BLOCK];
        for i in 0..BLOCK {
            terms[i] = exp((f64::from(logits[i]) - f64::from(max)) / temperature);
        }
        if keep != Keep::ALL {
            for i in 0..BLOCK {
                if !keep.has((number * BLOCK + i) as u32, logits[i]) {
                    terms[i] = 0.0;
                }
            }
        }
        let mut width = BLOCK / 2;
        while width > 0 {
            for i in 0..width {
                terms[i] += terms[i + width];
            }
            width /= 2;
        }
        *out = terms[0];
    }
}

dispatched! {
    /// Sums of exp((z - max) / temperature) over the kept tokens of each block, folded in halves.
    pub fn exp_sums = exp_sum_body(row: &[f32], keep: Keep, max: f32, temperature: f64, sums: &mut [f64])
}

/// Folds `sums` in halves, filled up with zeros to a power of two.
pub fn fold(sums: &mut Vec<f64>) -> f64 {
    let mut width = sums.len().next_power_of_two();
    sums.resize(width, 0.0);
    while width > 1 {
        width /= 2;
        for i in 0..width {
            sums[i] += sums[i + width];
        }
    }
    sums[0]
}

/// Which tokens a warp leaves: those at or before a last one, in the order of falling logit, then rising id.
/// Masked tokens (minus infinity) are never left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Keep {
    logit: f32,
    token: u32,
}

impl Keep {
    pub const ALL: Keep = Keep {
        logit: f32::NEG_INFINITY,
        token: 0,
    };

    pub fn up_to(logit: f32, token: u32) -> Self {
        Keep { logit, token }
    }

    /// No token below this logit is kept.
    pub fn floor(self) -> f32 {
        self.logit
    }

    #[inline(always)]
    pub fn has(self, token: u32, logit: f32) -> bool {
        (logit > self.logit) | ((logit == self.logit) & (token <= self.token) & (logit > f32::NEG_INFINITY))
    }
}

/// A row with the maxima of its chunks, known to hold no NaN, no plus infinity and at least one token that is not masked.
pub struct Row<'a> {
    pub logits: &'a [f32],
    pub max: f32,
    maxima: &'a [f32],
    chunk: usize,
}

impl<'a> Row<'a> {
    /// Looks through `logits` once, for `argmax` alone. `room` is working memory, kept from row to row.
    pub fn greedy(logits: &'a [f32], room: &'a mut Vec<f32>) -> Result<Self, RowError> {
        Self::scanned(logits, GREEDY_CHUNK, room)
    }

    /// Looks through `logits` once, keeping the maxima of its blocks.
    pub fn blocked(logits: &'a [f32], room: &'a mut Vec<f32>) -> Result<Self, RowError> {
        Self::scanned(logits, BLOCK, room)
    }

    fn scanned(logits: &'a [f32], chunk: usize, room: &'a mut Vec<f32>) -> Result<Self, RowError> {
        room.clear();
        room.resize(logits.len().div_ceil(chunk), f32::NEG_INFINITY);
        if scan(logits, chunk, room) {
            return Err(RowError::NotANumber);
        }
        let max = room.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if max == f32::INFINITY {
            return Err(RowError::PlusInfinity);
        }
        if max == f32::NEG_INFINITY {
            return Err(RowError::AllMasked);
        }
        Ok(Row {
            logits,
            max,
            maxima: room,
            chunk,
        })
    }

    /// Maxima of the blocks, of a row that was scanned by blocks.
    pub fn block_maxima(&self) -> &[f32] {
        debug_assert_eq!(self.chunk, BLOCK);
        self.maxima
    }

    /// The lowest id of the greatest logit.
    pub fn argmax(&self) -> u32 {
        let chunk = self.maxima.iter().position(|m| *m == self.max).unwrap_or(0);
        let first = chunk * self.chunk;
        let within = self.logits[first..].iter().position(|z| *z == self.max);
        (first + within.unwrap_or(0)) as u32
    }

    /// Sum of exp((z - max) / temperature) over the kept tokens, in the specified order; at least 1.
    pub fn exp_sum(&self, keep: Keep, temperature: f64) -> f64 {
        let mut sums = vec![0.0; self.logits.len().div_ceil(BLOCK)];
        exp_sums(self.logits, keep, self.max, temperature, &mut sums);
        fold(&mut sums)
    }

    /// The `count` greatest (at least 1; fewer where fewer are not masked), by falling logit, then rising id.
    pub fn top(&self, count: usize) -> Vec<(f32, u32)> {
        let count = count.clamp(1, self.logits.len());
        // The count-th greatest block maximum is a floor: at least `count` logits reach it.
        let floor = if count < self.block_maxima().len() {
            let mut maxima = self.block_maxima().to_vec();
            *maxima.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1
        } else {
            f32::NEG_INFINITY
        };
        let mut found = Vec::new();
        for (number, (block, max)) in self.logits.chunks(BLOCK).zip(self.block_maxima()).enumerate() {
            if *max >= floor {
                let first = (number * BLOCK) as u32;
                found.extend(
                    (first..)
                        .zip(block)
                        .filter(|(_, z)| **z >= floor && **z > f32::NEG_INFINITY)
                        .map(|(token, z)| (*z + 0.0, token)), // + 0.0: minus zero ties with zero
                );
            }
        }
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if found.len() > count {
            found.select_nth_unstable_by(count - 1, order);
            found.truncate(count);
        }
        found.sort_unstable_by(order);
        found
    }
}
