//! Natural logarithm and exponential that give the same bits everywhere.
//!
//! Libraries differ in the last bit, so both are spelled out as IEEE 754 double additions, subtractions,
//! multiplications and divisions in a fixed order, without fused multiply-add (Rust never fuses on its own).
//! `docs/wire.md`, "Seeded noise", is the specification; there are no branches, so loops over them vectorise.

const LN2_HI: f64 = 6.93147180369123816490e-01;
const LN2_LO: f64 = 1.90821492927058770002e-10;
const LOG2_E: f64 = std::f64::consts::LOG2_E;

/// fdlibm's coefficients for log(1 + f) (Sun Microsystems, `e_log.c`).
const LG: [f64; 7] = [
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
];

/// 1/n! for n = 13 down to 0: the Taylor series; its rest at |r| <= log(2)/2 is below 5e-18.
const INVERSE_FACTORIALS: [f64; 14] = [
    1.0 / 6227020800.0,
    1.0 / 479001600.0,
    1.0 / 39916800.0,
    1.0 / 3628800.0,
    1.0 / 362880.0,
    1.0 / 40320.0,
    1.0 / 5040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

/// Below this `exp` is 0: far under what any sum here can notice, far above where powers of two go subnormal.
pub const EXP_FLOOR: f64 = -700.0;

/// log(x) of a positive, normal, finite x, within one unit in the last place.
#[inline(always)]
pub fn log(x: f64) -> f64 {
    // x = 2^k * m with sqrt(1/2) <= m < sqrt(2); the constant is the high word of sqrt(1/2), as in musl.
    let shifted = x.to_bits().wrapping_add(0x3ff0_0000_0000_0000 - 0x3fe6_a09e_0000_0000);
    // An integer below 2^52 becomes a double by standing in the mantissa of 2^52: exact, and one instruction.
    let k = f64::from_bits(0x4330_0000_0000_0000 | (shifted >> 52)) - (4503599627370496.0 + 1023.0);
    let m = f64::from_bits((shifted & 0x000f_ffff_ffff_ffff) + 0x3fe6_a09e_0000_0000);
    let f = m - 1.0;
    let s = f / (2.0 + f);
    let z = s * s;
    let w = z * z;
    let even = w * (LG[1] + w * (LG[3] + w * LG[5]));
    let odd = z * (LG[0] + w * (LG[2] + w * (LG[4] + w * LG[6])));
    let rest = odd + even;
    let half_square = (0.5 * f) * f;
    s * (half_square + rest) + k * LN2_LO - half_square + f + k * LN2_HI
}

/// exp(x) for x <= 0 (minus infinity included), within two units in the last place; 0 below `EXP_FLOOR`.
#[inline(always)]
pub fn exp(x: f64) -> f64 {
    // Adding 1.5 * 2^52 rounds to the nearest integer (ties to even) and leaves it in the low mantissa bits.
    const MAGIC: f64 = 6755399441055744.0;
    let clamped = if x < EXP_FLOOR { EXP_FLOOR } else { x };
    let rounded = clamped * LOG2_E + MAGIC;
    let k = rounded - MAGIC;
    let r = (clamped - k * LN2_HI) - k * LN2_LO;
    let mut p = INVERSE_FACTORIALS[0];
    for c in &INVERSE_FACTORIALS[1..] {
        p = p * r + c;
    }
    let power = f64::from_bits(rounded.to_bits().wrapping_add(1023) << 52); // 2^k
    if x < EXP_FLOOR {
        0.0
    } else {
        p * power
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn log_is_within_one_ulp_of_the_platforms(x in prop_oneof![1e-19f64..1.0, 0.5f64..2.0, 1.0f64..1e300]) {
            let want = x.ln();
            prop_assert!((log(x) - want).abs() <= f64::EPSILON * want.abs(), "{x}: {} {want}", log(x));
        }

        #[test]
        fn exp_is_within_two_ulp_of_the_platforms(x in prop_oneof![-1.0f64..0.0, -700.0f64..0.0]) {
            let want = x.exp();
            prop_assert!((exp(x) - want).abs() <= 2.0 * f64::EPSILON * want, "{x}: {} {want}", exp(x));
        }
    }

    #[test]
    fn the_ends_are_exact() {
        assert_eq!(log(1.0), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f64::NEG_INFINITY), 0.0);
        assert_eq!(exp(-700.1), 0.0);
        assert!(exp(-700.0) > 0.0);
    }
}
