//! Standard Gumbel noise as a pure function of (seed, position, token).
//!
//! The generator is Philox4x32-10 (Salmon et al., SC 2011): counter-based, with published known answers, and made of
//! 32-bit multiplications that every CPU and GPU has. Of the noise of 128 neighbouring tokens the largest is drawn
//! first: if E are independent standard exponentials, -log(E) is Gumbel; the least of n of them is exponential with
//! rate n, stands at each place with equal chance, and the others exceed it by fresh standard exponentials (they have
//! no memory). So one draw bounds a whole block, and an argmax need not look into most blocks; yet every token's noise
//! is exactly standard and independent. `docs/wire.md`, "Seeded noise", is the specification.

use crate::math::log;

/// Tokens that share one bound.
pub const BLOCK: usize = 128;

/// Counters that one batch takes side by side; a multiple of the widest vector.
const LANES: usize = 16;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// The fourth counter word: which of the two draws.
const OF_BLOCK: u32 = 0;
const OF_TOKEN: u32 = 1;

/// Where the noise is taken: everything but the token.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub seed: u64,
    pub position: u64,
}

/// `words[w][i]` is word w of counter i.
type Words<const N: usize> = [[u32; N]; 4];

/// Ten rounds over N counters side by side.
#[inline(always)]
fn philox<const N: usize>(mut x: Words<N>, seed: u64) -> Words<N> {
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        for i in 0..N {
            let a = u64::from(x[0][i]) * u64::from(MULTIPLIERS[0]);
            let b = u64::from(x[2][i]) * u64::from(MULTIPLIERS[1]);
            x[0][i] = (b >> 32) as u32 ^ x[1][i] ^ key[0];
            x[1][i] = b as u32;
            x[2][i] = (a >> 32) as u32 ^ x[3][i] ^ key[1];
            x[3][i] = a as u32;
        }
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    x
}

#[inline(always)]
fn counters<const N: usize>(first: u32, place: Place, which: u32) -> Words<N> {
    let mut words = [
        [0; N],
        [place.position as u32; N],
        [(place.position >> 32) as u32; N],
        [which; N],
    ];
    for (i, word) in words[0].iter_mut().enumerate() {
        *word = first.wrapping_add(i as u32);
    }
    words
}

/// A double strictly between 0 and 1: the upper 52 of 64 bits, and a half.
#[inline(always)]
fn uniform(low: u32, high: u32) -> f64 {
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 12;
    // 1.bits is a double in 1..2; less 1, and half a step up: exact, and free of integer conversions.
    (f64::from_bits(0x3ff0_0000_0000_0000 | bits) - 1.0) + 0.5 * f64::EPSILON
}

/// Least exponentials and their lanes of `least.len()` blocks, block 0 first.
#[inline(always)]
pub fn blocks(place: Place, least: &mut [f64], lanes: &mut [u8]) {
    for (batch, (least, lanes)) in least.chunks_mut(LANES).zip(lanes.chunks_mut(LANES)).enumerate() {
        let words = philox::<LANES>(counters((batch * LANES) as u32, place, OF_BLOCK), place.seed);
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            out[i] = -log(uniform(words[0][i], words[1][i])) / BLOCK as f64;
        }
        for i in 0..least.len() {
            least[i] = out[i];
            lanes[i] = (words[2][i] >> 25) as u8;
        }
    }
}

/// Gumbel noise of the BLOCK tokens of block number `block`, whose least exponential is `least` at `lane`.
#[inline(always)]
pub fn tokens(place: Place, block: u32, least: f64, lane: u8, noise: &mut [f64; BLOCK]) {
    for batch in 0..BLOCK / (2 * LANES) {
        let first = block * (BLOCK / 2) as u32 + (batch * LANES) as u32;
        let words = philox::<LANES>(counters(first, place, OF_TOKEN), place.seed);
        let out = &mut noise[batch * 2 * LANES..][..2 * LANES];
        let (mut even, mut odd) = ([0.0; LANES], [0.0; LANES]);
        for i in 0..LANES {
            even[i] = -log(least + -log(uniform(words[0][i], words[1][i])));
            odd[i] = -log(least + -log(uniform(words[2][i], words[3][i])));
        }
        for i in 0..LANES {
            out[2 * i] = even[i];
            out[2 * i + 1] = odd[i];
        }
    }
    noise[usize::from(lane)] = -log(least);
}

/// Gumbel noise of one token of a block whose least exponential is `least` at `lane`.
#[inline(always)]
pub fn token(place: Place, token: u32, least: f64, lane: u8) -> f64 {
    if token % BLOCK as u32 == u32::from(lane) {
        return -log(least);
    }
    let words = philox::<1>(counters(token / 2, place, OF_TOKEN), place.seed);
    let pair = 2 * (token as usize % 2);
    -log(least + -log(uniform(words[pair][0], words[pair + 1][0])))
}

/// Gumbel noise of one token, from nothing. For tests and readers; the sampler knows the block already.
pub fn gumbel(place: Place, id: u32) -> f64 {
    let words = philox::<1>(counters(id / BLOCK as u32, place, OF_BLOCK), place.seed);
    let least = -log(uniform(words[0][0], words[1][0])) / BLOCK as f64;
    token(place, id, least, (words[2][0] >> 25) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Known answers of Random123 1.14.0, `kat_vectors`.
    #[test]
    fn philox_gives_the_published_answers() {
        let run = |counter: [u32; 4], seed| {
            let words = philox::<LANES>(counter.map(|word| [word; LANES]), seed);
            [words[0][3], words[1][3], words[2][3], words[3][3]]
        };
        assert_eq!(run([0; 4], 0), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(
            run([u32::MAX; 4], u64::MAX),
            [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]
        );
        assert_eq!(
            run([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], 0x299f_31d0_a409_3822),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn a_uniform_is_inside_the_open_interval() {
        assert_eq!(uniform(0, 0), 0.5f64.powi(53));
        assert_eq!(uniform(u32::MAX, u32::MAX), 1.0 - 0.5f64.powi(53));
    }

    proptest! {
        #[test]
        fn blocks_and_single_tokens_agree(seed: u64, position: u64, token in 0u32..9000) {
            let place = Place { seed, position };
            let (mut least, mut lanes) = (vec![0.0; 71], vec![0; 71]);
            blocks(place, &mut least, &mut lanes);
            let block = token as usize / BLOCK;
            let mut noise = [0.0; BLOCK];
            tokens(place, block as u32, least[block], lanes[block], &mut noise);
            prop_assert_eq!(noise[token as usize % BLOCK].to_bits(), gumbel(place, token).to_bits());
            // The sampler's bound: nothing in a block exceeds its best by more than rounding.
            prop_assert!(noise.iter().all(|g| *g <= -log(least[block]) + 1e-9));
            prop_assert!(noise.iter().all(|g| g.is_finite()));
        }
    }
}
