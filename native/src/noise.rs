//! Standard Gumbel noise as a pure function of (seed, position, token).
//!
//! The generator is Philox4x32-10 (Salmon et al., SC 2011): counter-based, with published known answers, and made of
//! 32-bit multiplications that every CPU and GPU has. Of the noise of a block of 128 tokens the largest is drawn first:
//! if E are independent standard exponentials, -log(E) is Gumbel; the least of n of them is exponential with
//! rate n, stands at each place with equal chance, and the others exceed it by fresh standard exponentials (they have
//! no memory). So one draw bounds a whole block, and an argmax need not look into most blocks; yet every token's noise
//! is exactly standard and independent. `docs/wire.md`, "Seeded noise", is the specification.

use crate::math::log;

/// Tokens that share one bound.
pub const BLOCK: usize = 128;

/// Blocks are interleaved by eight: a token's low three bits say which. So the maxima of eight blocks are one vector's
/// running maximum, and finding them costs a scan of the row no more than the row's maximum does.
pub const GROUP: usize = 8 * BLOCK;

/// The ids of a block's tokens, place 0 first.
#[inline(always)]
pub fn ids(block: usize) -> impl Iterator<Item = usize> {
    let first = block / 8 * GROUP + block % 8;
    (0..BLOCK).map(move |place| first + 8 * place)
}

/// Block and place of a token.
#[inline(always)]
pub fn place_of(token: u32) -> (u32, u32) {
    (token / GROUP as u32 * 8 + token % 8, token / 8 % BLOCK as u32)
}

/// Counters that one batch takes side by side; a multiple of the widest vector.
const LANES: usize = 16;

const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
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

/// `words[w][i]` is word w of counter i. 32 bits in 64: so a product needs no unpacking of vectors.
type Words<const N: usize> = [[u64; N]; 4];

const LOW: u64 = 0xFFFF_FFFF;

/// Ten rounds over N counters side by side.
#[inline(always)]
fn philox<const N: usize>(mut x: Words<N>, seed: u64) -> Words<N> {
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        for i in 0..N {
            let a = (x[0][i] & LOW) * MULTIPLIERS[0];
            let b = (x[2][i] & LOW) * MULTIPLIERS[1];
            // Above their 32 bits words may hold rubbish, which the next multiplication drops.
            x[0][i] = (b >> 32) ^ x[1][i] ^ u64::from(key[0]);
            x[1][i] = b;
            x[2][i] = (a >> 32) ^ x[3][i] ^ u64::from(key[1]);
            x[3][i] = a;
        }
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    for word in &mut x {
        for lane in word {
            *lane &= LOW;
        }
    }
    x
}

#[inline(always)]
fn counters<const N: usize>(first: u32, place: Place, which: u32) -> Words<N> {
    let mut words = [
        [0; N],
        [place.position & LOW; N],
        [place.position >> 32; N],
        [u64::from(which); N],
    ];
    for i in 0..N {
        words[0][i] = u64::from(first.wrapping_add(i as u32));
    }
    words
}

/// A double strictly between 0 and 1: the upper 52 of 64 bits, and a half.
#[inline(always)]
fn uniform(low: u64, high: u64) -> f64 {
    let bits = (high << 20) | (low >> 12);
    // 1.bits is a double in 1..2; less 1, and half a step up: exact, and free of integer conversions.
    (f64::from_bits(0x3ff0_0000_0000_0000 | bits) - 1.0) + 0.5 * f64::EPSILON
}

/// Least exponentials and their places of `least.len()` blocks, block 0 first. A counter serves two blocks.
#[inline(always)]
pub fn blocks(place: Place, least: &mut [f64], places: &mut [u8]) {
    for (batch, (least, places)) in (least.chunks_mut(2 * LANES).zip(places.chunks_mut(2 * LANES))).enumerate() {
        let words = philox::<LANES>(counters((batch * LANES) as u32, place, OF_BLOCK), place.seed);
        let mut out = [[0.0; LANES]; 2];
        for half in 0..2 {
            for i in 0..LANES {
                out[half][i] = first_of_block(words[2 * half][i], words[2 * half + 1][i]);
            }
        }
        for (i, (least, at)) in least.iter_mut().zip(places).enumerate() {
            *least = out[i % 2][i / 2];
            *at = place_in_block(words[2 * (i % 2)][i / 2]);
        }
    }
}

/// The least of a block's exponentials.
#[inline(always)]
fn first_of_block(low: u64, high: u64) -> f64 {
    -log(uniform(low, high)) / BLOCK as f64
}

/// Where it stands: seven of the twelve bits that the uniform leaves.
#[inline(always)]
fn place_in_block(low: u64) -> u8 {
    low as u8 & 0x7F
}

/// What a token's noise is made of: the uniform at `at` in `block`.
#[inline(always)]
pub fn uniform_of(place: Place, block: u32, at: u32) -> f64 {
    let counter = block * (BLOCK / 2) as u32 + at / 2;
    let words = philox::<1>(counters(counter, place, OF_TOKEN), place.seed);
    let pair = 2 * (at as usize % 2);
    uniform(words[pair][0], words[pair + 1][0])
}

/// Gumbel noise of one token, from nothing: the definition.
pub fn gumbel(place: Place, token: u32) -> f64 {
    let (block, at) = place_of(token);
    let words = philox::<1>(counters(block / 2, place, OF_BLOCK), place.seed);
    let pair = 2 * (block as usize % 2);
    let least = first_of_block(words[pair][0], words[pair + 1][0]);
    if at == u32::from(place_in_block(words[pair][0])) {
        -log(least)
    } else {
        -log(least + -log(uniform_of(place, block, at)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Known answers of Random123 1.14.0, `kat_vectors`.
    #[test]
    fn philox_gives_the_published_answers() {
        let run = |counter: [u32; 4], seed: u64| {
            let words = philox(counter.map(|word| [u64::from(word); LANES]), seed);
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
        assert_eq!(uniform(LOW, LOW), 1.0 - 0.5f64.powi(53));
    }

    proptest! {
        #[test]
        fn blocks_and_single_tokens_agree(seed: u64, position: u64, token in 0u32..9000) {
            let place = Place { seed, position };
            let (mut least, mut lanes) = (vec![0.0; 72], vec![0; 72]);
            blocks(place, &mut least, &mut lanes);
            let (block, at) = place_of(token);
            prop_assert_eq!(ids(block as usize).nth(at as usize), Some(token as usize));
            let block = block as usize;
            let best = -log(least[block]);
            let noise: Vec<f64> = ids(block).map(|id| gumbel(place, id as u32)).collect();
            prop_assert_eq!(noise[usize::from(lanes[block])].to_bits(), best.to_bits());
            let other = (at + 1) % BLOCK as u32;
            if other != u32::from(lanes[block]) {
                let own = -log(uniform_of(place, block as u32, other));
                prop_assert_eq!(noise[other as usize].to_bits(), (-log(least[block] + own)).to_bits());
            }
            // The sampler's bound: nothing in a block exceeds its best by more than rounding.
            prop_assert!(noise.iter().all(|g| *g <= best + 1e-9));
            prop_assert!(noise.iter().all(|g| g.is_finite()));
        }
    }
}
