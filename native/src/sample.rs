//! The target's own token: warp (temperature, top-k, top-p), then the argmax with seeded Gumbel noise.

use crate::math::log;
use crate::noise::{self, Place, BLOCK};
use crate::row::{padded, Keep, Row};
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
    lanes: Vec<u8>,
    bounds: Vec<f64>,
}

/// The token that the target says after this row, at `place`.
pub fn draw(row: &Row<'_>, warp: Warp, place: Place, room: &mut Room) -> u32 {
    if warp.temperature == 0.0 {
        return row.argmax();
    }
    let keep = kept(row, warp);
    let maxima = row.block_maxima();
    let blocks = maxima.len();
    room.least.resize(blocks, 0.0);
    room.lanes.resize(blocks, 0);
    room.bounds.resize(blocks, 0.0);
    bounds(maxima, row.max, warp.temperature, place, room);
    let mut best = Best {
        score: f64::NEG_INFINITY,
        token: u32::MAX,
    };
    let look = |number: usize, best: &mut Best| {
        let logits = &row.logits[number * BLOCK..row.logits.len().min((number + 1) * BLOCK)];
        let block = Block {
            number: number as u32,
            logits,
            least: room.least[number],
            lane: room.lanes[number],
        };
        look_into(block, row.max, warp.temperature, keep, place, best);
    };
    // Two blocks that promise much come first: their best rules nearly all others out.
    look(highest(&room.bounds), &mut best);
    look(highest(maxima), &mut best);
    for number in 0..blocks {
        if room.bounds[number] >= best.score && maxima[number] >= keep.floor() {
            look(number, &mut best);
        }
    }
    best.token
}

/// The first place of the greatest value.
fn highest<T: PartialOrd>(values: &[T]) -> usize {
    let mut top = 0;
    for (place, value) in values.iter().enumerate() {
        if *value > values[top] {
            top = place;
        }
    }
    top
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
            sum += crate::math::exp((f64::from(*logit) - f64::from(row.max)) / warp.temperature);
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
    noise::blocks(place, &mut room.least, &mut room.lanes);
    for ((bound, block_max), least) in room.bounds.iter_mut().zip(maxima).zip(&room.least) {
        let score = (f64::from(*block_max) - f64::from(max)) / temperature;
        *bound = score + (-log(*least) + SLACK);
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

#[derive(Clone, Copy)]
struct Block<'a> {
    number: u32,
    logits: &'a [f32],
    least: f64,
    lane: u8,
}

/// Noise of so many tokens one by one costs what the whole block does side by side.
const MANY: usize = 24;

#[inline(always)]
fn look_into_body(block: Block<'_>, max: f32, temperature: f64, keep: Keep, place: Place, best: &mut Best) {
    let logits = padded(block.logits);
    let first = block.number * BLOCK as u32;
    let mut scores = [0.0; BLOCK];
    for i in 0..BLOCK {
        scores[i] = (f64::from(logits[i]) - f64::from(max)) / temperature;
    }
    // The block's bound with each token's own logit leaves few of them.
    let bound = -log(block.least) + SLACK;
    let mut hopeful = [false; BLOCK];
    for i in 0..BLOCK {
        hopeful[i] = scores[i] + bound >= best.score;
    }
    let mut noise = [0.0; BLOCK];
    let many = hopeful.iter().filter(|hope| **hope).count() > MANY;
    if many {
        noise::tokens(place, block.number, block.least, block.lane, &mut noise);
    }
    for i in 0..BLOCK {
        let token = first + i as u32;
        if !hopeful[i] || !keep.has(token, logits[i]) {
            continue;
        }
        let gumbel = if many {
            noise[i]
        } else {
            noise::token(place, token, block.least, block.lane)
        };
        let score = scores[i] + gumbel;
        if score > best.score || (score == best.score && token < best.token) {
            *best = Best { score, token };
        }
    }
}

dispatched! {
    /// Raises `best` to the best kept token of the block, if that is better; ties go to the lowest id.
    fn look_into = look_into_body(
        block: Block<'_>, max: f32, temperature: f64, keep: Keep, place: Place, best: &mut Best,
    )
}
