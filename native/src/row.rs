//! One row of logits: its block maxima in one pass, its argmax, sums of exponentials in a fixed order.

use crate::math::exp;
use crate::noise::{ids, BLOCK, GROUP};
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

#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if a > b {
        a
    } else {
        b
    }
}

#[inline(always)]
fn scan_body(row: &[f32], maxima: &mut [f32]) -> bool {
    // The sum carries a NaN to the end for one addition a value, where a comparison would need two steps. It also turns
    // NaN by infinities of both signs or by overflow: so it only asks for a second, exact look.
    let mut sums = [0.0f32; LANES];
    for (group, out) in row.chunks(GROUP).zip(maxima.chunks_exact_mut(8)) {
        let mut best = [f32::NEG_INFINITY; LANES];
        let (whole, rest) = group.as_chunks::<LANES>();
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
        for i in 0..8 {
            let halves = (greater(best[i], best[i + 8]), greater(best[i + 16], best[i + 24]));
            out[i] = greater(halves.0, halves.1);
        }
    }
    sums.iter().any(|sum| sum.is_nan()) && row.iter().any(|value| value.is_nan())
}

dispatched! {
    /// The maximum of each block of `row` into `maxima`, eight for each group; true if any value is NaN.
    pub fn scan = scan_body(row: &[f32], maxima: &mut [f32]) -> bool
}

#[inline(always)]
fn exp_sum_body(row: &[f32], keep: Keep, max: f32, temperature: f64, sums: &mut [f64]) {
    for ((number, block), out) in row.chunks(BLOCK).enumerate().zip(sums.iter_mut()) {
        let mut logits = [f32::NEG_INFINITY; BLOCK]; // masked where the row ends
        logits[..block.len()].copy_from_slice(block);
        let mut terms = [0.0; BLOCK];
        for i in 0..BLOCK {
            terms[i] = f64::from(logits[i]) - f64::from(max);
        }
        if temperature != 1.0 {
            for term in &mut terms {
                *term /= temperature;
            }
        }
        for term in &mut terms {
            *term = exp(*term);
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
    /// Sums of exp((z - max) / temperature) over the kept ones of each 128 neighbours, folded in halves.
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

/// A row with its block maxima, known to hold no NaN, no plus infinity and at least one token that is not masked.
pub struct Row<'a> {
    pub logits: &'a [f32],
    pub maxima: &'a [f32],
    pub max: f32,
}

impl<'a> Row<'a> {
    /// Looks through `logits` once. `room` is working memory, kept from row to row.
    pub fn new(logits: &'a [f32], room: &'a mut Vec<f32>) -> Result<Self, RowError> {
        room.clear();
        room.resize(logits.len().div_ceil(GROUP) * 8, f32::NEG_INFINITY);
        if scan(logits, room) {
            return Err(RowError::NotANumber);
        }
        let max = room.iter().copied().fold(f32::NEG_INFINITY, greater);
        if max == f32::INFINITY {
            return Err(RowError::PlusInfinity);
        }
        if max == f32::NEG_INFINITY {
            return Err(RowError::AllMasked);
        }
        Ok(Row {
            logits,
            maxima: room,
            max,
        })
    }

    /// The lowest id of the greatest logit.
    pub fn argmax(&self) -> u32 {
        let block = self.maxima.iter().position(|m| *m == self.max).unwrap_or(0);
        let first = block / 8 * GROUP;
        let within = self.logits[first..].iter().position(|z| *z == self.max);
        (first + within.unwrap_or(0)) as u32
    }

    /// The logits of a block, masked where the row ends.
    #[inline(always)]
    pub fn block(&self, block: usize) -> [f32; BLOCK] {
        let first = block / 8 * GROUP;
        let group = &self.logits[first..self.logits.len().min(first + GROUP)];
        let mut logits = [f32::NEG_INFINITY; BLOCK];
        if let Ok(whole) = <&[f32; GROUP]>::try_from(group) {
            for place in 0..BLOCK {
                logits[place] = whole[8 * place + block % 8];
            }
        } else {
            for (logit, value) in logits.iter_mut().zip(group.iter().skip(block % 8).step_by(8)) {
                *logit = *value;
            }
        }
        logits
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
        let floor = if count < self.maxima.len() {
            let mut maxima = self.maxima.to_vec();
            *maxima.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1
        } else {
            f32::NEG_INFINITY
        };
        let mut found = Vec::new();
        for (block, max) in self.maxima.iter().enumerate() {
            if *max >= floor {
                for (token, z) in ids(block).zip(self.block(block)) {
                    if z >= floor && z > f32::NEG_INFINITY {
                        found.push((z + 0.0, token as u32)); // + 0.0: minus zero ties with zero
                    }
                }
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cmp::Ordering;

    fn logits() -> impl Strategy<Value = Vec<f32>> {
        let value = prop_oneof![
            8 => -10.0f32..10.0,
            2 => (-3i8..3).prop_map(f32::from),
            1 => prop::num::f32::SUBNORMAL,
            1 => Just(-0.0f32),
            1 => Just(f32::NEG_INFINITY),
            1 => Just(f32::MAX),
            1 => Just(f32::MIN),
        ];
        prop::collection::vec(value, 1..3000)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn both_versions_of_a_scan_and_a_sum_agree(row in logits()) {
            let (mut with, mut without) = (vec![0.0; 24], vec![0.0; 24]);
            prop_assert_eq!(scan(&row, &mut with), scan_body(&row, &mut without));
            prop_assert_eq!(&with, &without);
            let (mut with, mut without) = (vec![0.0; 24], vec![0.0; 24]);
            exp_sums(&row, Keep::ALL, f32::MAX, 0.7, &mut with);
            exp_sum_body(&row, Keep::ALL, f32::MAX, 0.7, &mut without);
            prop_assert_eq!(with, without);
        }

        #[test]
        fn a_row_knows_its_argmax_and_block_maxima(row in logits()) {
            let mut room = Vec::new();
            let Ok(found) = Row::new(&row, &mut room) else {
                prop_assert!(row.iter().all(|z| *z == f32::NEG_INFINITY));
                return Ok(());
            };
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert_eq!(Some(found.argmax() as usize), row.iter().position(|z| *z == max));
            for (block, block_max) in found.maxima.iter().enumerate() {
                let want = ids(block).filter_map(|id| row.get(id)).copied().fold(f32::NEG_INFINITY, f32::max);
                prop_assert_eq!(*block_max, want);
                let values = found.block(block);
                for (value, id) in values.iter().zip(ids(block)) {
                    prop_assert_eq!(*value, row.get(id).copied().unwrap_or(f32::NEG_INFINITY));
                }
            }
        }

        #[test]
        fn the_top_is_what_sorting_gives(row in logits(), count in 1usize..3000) {
            let mut room = Vec::new();
            if let Ok(found) = Row::new(&row, &mut room) {
                let mut want: Vec<_> = row.iter().copied().zip(0u32..).filter(|(z, _)| *z > f32::NEG_INFINITY).collect();
                want.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal).then(a.1.cmp(&b.1)));
                want.truncate(count);
                prop_assert_eq!(found.top(count), want);
            }
        }

        #[test]
        fn a_nan_or_plus_infinity_anywhere_is_found(mut row in logits(), at: prop::sample::Index) {
            let at = at.index(row.len());
            row[at] = f32::NAN;
            prop_assert_eq!(Row::new(&row, &mut Vec::new()).err(), Some(RowError::NotANumber));
            row[at] = f32::INFINITY;
            prop_assert_eq!(Row::new(&row, &mut Vec::new()).err(), Some(RowError::PlusInfinity));
        }
    }

    #[test]
    fn an_empty_or_masked_row_is_refused() {
        for row in [vec![], vec![f32::NEG_INFINITY; 5]] {
            assert_eq!(Row::new(&row, &mut Vec::new()).err(), Some(RowError::AllMasked));
        }
    }
}
