//! The target's own token: warp (temperature, top-k, top-p), then the argmax with seeded Gumbel noise.

use crate::math::{exp, log};
use crate::noise::{self, ids, Place, BLOCK};
use crate::row::{Keep, Row};
use crate::simd::dispatched;

/// How a row becomes a distribution. `temperature` 0 is the argmax; `top_k` 0 and `top_p` 1 leave everything.
#[derive(Clone, Copy, Debug)]
pub struct Warp {
    pub temperature: f64,
    pub top_k: u64,
    pub top_p: f64,
}

/// Added to a block's noise bound: far above the rounding of `log`, far below what costs a look too many.
const SLACK: f64 = 1e-9;

/// Working memory, kept from row to row.
#[derive(Default)]
pub struct Room {
    least: Vec<f64>,
    places: Vec<u8>,
    bounds: Vec<f64>,
}

/// The token that the target says after this row, at `place`.
pub fn draw(row: &Row<'_>, warp: Warp, place: Place, room: &mut Room) -> u32 {
    if warp.temperature == 0.0 {
        return row.argmax();
    }
    let keep = kept(row, warp);
    let blocks = row.maxima.len();
    room.least.resize(blocks, 0.0);
    room.places.resize(blocks, 0);
    room.bounds.resize(blocks, 0.0);
    bounds(row.maxima, row.max, warp.temperature, place, room);
    // The best-noised token of each block is known by now, and the winner is nearly always one of them.
    let mut best = promising(row, warp.temperature, keep, room);
    for number in 0..blocks {
        if room.bounds[number] >= best.score && row.maxima[number] >= keep.floor() {
            let block = Block {
                number,
                least: room.least[number],
                place: room.places[number],
            };
            look_into(row, block, warp.temperature, keep, place, &mut best);
        }
    }
    best.token
}

/// The best of the kept tokens that have the least exponential of their block.
fn promising(row: &Row<'_>, temperature: f64, keep: Keep, room: &Room) -> Best {
    let mut best = Best {
        score: f64::NEG_INFINITY,
        token: u32::MAX,
    };
    for block in 0..row.maxima.len() {
        // `bound` is score and slack of such a token that has the block's greatest logit.
        if room.bounds[block] < best.score {
            continue;
        }
        let token = block / 8 * noise::GROUP + block % 8 + 8 * usize::from(room.places[block]);
        let logit = row.logits.get(token).copied().unwrap_or(f32::NEG_INFINITY);
        if keep.has(token as u32, logit) {
            best.meet(
                scaled(logit, row.max, temperature) + -log(room.least[block]),
                token as u32,
            );
        }
    }
    best
}

/// (z - max) / T: at most 0, so nothing overflows however small T is.
#[inline(always)]
fn scaled(logit: f32, max: f32, temperature: f64) -> f64 {
    (f64::from(logit) - f64::from(max)) / temperature
}

/// Natural log-probability of `token` before temperature and warping.
pub fn logprob(row: &Row<'_>, token: u32) -> f32 {
    let sum = row.exp_sum(Keep::ALL, 1.0);
    ((f64::from(row.logits[token as usize]) - f64::from(row.max)) - log(sum)) as f32
}

/// What top-k, then top-p over what it left, keep.
fn kept(row: &Row<'_>, warp: Warp) -> Keep {
    let mut keep = Keep::ALL;
    let vocabulary = row.logits.len();
    let mut limit = vocabulary;
    if warp.top_k > 0 && warp.top_k < vocabulary as u64 {
        limit = warp.top_k as usize;
        if let Some((logit, token)) = row.top(limit).last() {
            keep = Keep::up_to(*logit, *token);
        }
    }
    if warp.top_p >= 1.0 {
        return keep;
    }
    let mass = warp.top_p * row.exp_sum(keep, warp.temperature);
    // Most nuclei are small: sort a few, and eight times as many where that was not enough.
    let mut count = 256;
    loop {
        let count_now = count.min(limit);
        let sorted = row.top(count_now);
        let mut sum = 0.0;
        for (logit, token) in &sorted {
            sum += exp((f64::from(*logit) - f64::from(row.max)) / warp.temperature);
            if sum >= mass {
                return Keep::up_to(*logit, *token);
            }
        }
        if count_now == limit || sorted.len() < count_now {
            return keep; // rounding left the sum short of its share: all of them
        }
        count *= 8;
    }
}

#[inline(always)]
fn bounds_body(maxima: &[f32], max: f32, temperature: f64, place: Place, room: &mut Room) {
    noise::blocks(place, &mut room.least, &mut room.places);
    for ((bound, block_max), least) in room.bounds.iter_mut().zip(maxima).zip(&room.least) {
        *bound = scaled(*block_max, max, temperature) + (-log(*least) + SLACK);
    }
}

dispatched! {
    /// For each block its least exponential and lane, and an upper bound of every score in it.
    fn bounds = bounds_body(maxima: &[f32], max: f32, temperature: f64, place: Place, room: &mut Room)
}

#[derive(Clone, Copy)]
struct Best {
    score: f64,
    token: u32,
}

impl Best {
    /// Takes a better one; ties go to the lowest id.
    #[inline(always)]
    fn meet(&mut self, score: f64, token: u32) {
        if score > self.score || (score == self.score && token < self.token) {
            *self = Best { score, token };
        }
    }
}

#[derive(Clone, Copy)]
struct Block {
    number: usize,
    least: f64,
    place: u8,
}

/// Relative; far above the rounding of a score, far below what keeps a token too many.
const MARGIN: f64 = 1e-6;

#[inline(always)]
fn look_into_body(row: &Row<'_>, block: Block, temperature: f64, keep: Keep, place: Place, best: &mut Best) {
    let logits = row.block(block.number);
    // The block's bound with each token's own logit leaves few of them: those above this, up to rounding.
    let max = f64::from(row.max);
    let below = (-log(block.least) + SLACK - best.score) * temperature;
    let floor = ((max - below) - MARGIN * (max.abs() + below.abs())) as f32;
    let mut hopeful = [false; BLOCK];
    for i in 0..BLOCK {
        hopeful[i] = logits[i] >= floor;
    }
    // The same bound turned round: the exponential that even the block's greatest logit needs. Held against a uniform
    // (-log u >= 1 - u) it saves most logarithms. Far below 0 scores are too coarse for it.
    let needed = scaled(row.maxima[block.number], row.max, temperature) - best.score;
    let limit = if needed <= 0.0 && best.score > -1e6 {
        exp(needed) * (1.0 + MARGIN)
    } else {
        f64::INFINITY
    };
    for (at, token) in ids(block.number).enumerate() {
        if !hopeful[at] || !keep.has(token as u32, logits[at]) {
            continue;
        }
        let mut exponential = block.least;
        if at != usize::from(block.place) {
            let uniform = noise::uniform_of(place, block.number as u32, at as u32);
            if block.least + (1.0 - uniform) > limit {
                continue;
            }
            exponential += -log(uniform);
        }
        best.meet(
            scaled(logits[at], row.max, temperature) + -log(exponential),
            token as u32,
        );
    }
}

dispatched! {
    /// Raises `best` to the best kept token of the block, if that is better.
    fn look_into = look_into_body(
        row: &Row<'_>, block: Block, temperature: f64, keep: Keep, place: Place, best: &mut Best,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::gumbel;
    use proptest::prelude::*;

    /// The definition: noise on every kept token, then the first of the greatest scores.
    fn naive(logits: &[f32], temperature: f64, keep: Keep, place: Place) -> u32 {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut best = Best {
            score: f64::NEG_INFINITY,
            token: u32::MAX,
        };
        for (logit, token) in logits.iter().zip(0..) {
            if keep.has(token, *logit) {
                best.meet(scaled(*logit, max, temperature) + gumbel(place, token), token);
            }
        }
        best.token
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))] // each of up to four thousand tokens

        #[test]
        fn pruning_never_changes_the_draw(
            logits in prop::collection::vec(prop_oneof![9 => -1.0f32..1.0, 1 => Just(f32::NEG_INFINITY)], 2..4000),
            scale in prop_oneof![Just(0.0f32), 0.01f32..30.0],
            temperature in prop_oneof![0.01f64..10.0, Just(5e-324), Just(1e300)],
            top_k in prop_oneof![2 => Just(0u64), 1 => 1u64..100],
            seed: u64,
            position in 0u64..1 << 50,
        ) {
            let logits: Vec<f32> = logits.iter().map(|z| if z.is_finite() { z * scale } else { *z }).collect();
            let mut room = Vec::new();
            if let Ok(row) = Row::new(&logits, &mut room) {
                let warp = Warp { temperature, top_k, top_p: 1.0 };
                let place = Place { seed, position };
                let want = naive(&logits, temperature, kept(&row, warp), place);
                prop_assert_eq!(draw(&row, warp, place, &mut Room::default()), want);
            }
        }
    }

    #[test]
    fn top_k_and_top_p_cut_ties_at_the_highest_ids() {
        let logits = [1.0, 2.0, 2.0, 2.0, 1.0];
        let mut room = Vec::new();
        let row = Row::new(&logits, &mut room).expect("a plain row");
        let left = |top_k, top_p| {
            let keep = kept(
                &row,
                Warp {
                    temperature: 1.0,
                    top_k,
                    top_p,
                },
            );
            (0..5).filter(|i| keep.has(*i, logits[*i as usize])).collect::<Vec<_>>()
        };
        assert_eq!(left(2, 1.0), [1, 2]);
        assert_eq!(left(4, 1.0), [0, 1, 2, 3]);
        assert_eq!(left(0, 0.3), [1, 2]);
        assert_eq!(left(3, 0.5), [1, 2]); // of what top-k left, a third each
        assert_eq!(left(0, 1e-9), [1]);
        assert_eq!(left(9, 1.0), [0, 1, 2, 3, 4]);
    }
}
