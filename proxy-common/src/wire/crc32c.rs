//! The CRC of SCTP (RFC 9260 appendix A), kept right after a change without reading the payload.
//!
//! A CRC is linear: the CRCs of two messages of one length differ by the CRC of their difference. A change of
//! four bytes that `n` bytes follow differs by those bytes' CRC, shifted by 8·n bits: multiplied by x^(8·n)
//! modulo the polynomial. That takes one multiplication for each bit of `n` that is set.

/// Castagnoli's polynomial, bits reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// 1, bits reversed.
const ONE: u32 = 1 << 31;

/// `POWERS[k]` is 1 and x^(8·2^k) modulo the polynomial, bits reversed: what to multiply by when bit `k` is
/// clear, and when it is set. A look-up instead of a choice, since a verifier follows both ways of a choice.
static POWERS: [[u32; 2]; 16] = {
    let mut powers = [[ONE, ONE >> 8]; 16];
    let mut k = 1;
    while k < 16 {
        powers[k][1] = multiply(powers[k - 1][1], powers[k - 1][1]);
        k += 1;
    }
    powers
};

/// x^32 modulo the polynomial, bits reversed.
const X32: u32 = multiply(multiply(ONE >> 8, ONE >> 8), multiply(ONE >> 8, ONE >> 8));

/// The product of two polynomials modulo the polynomial; masks instead of branches.
#[inline(always)]
#[must_use]
pub const fn multiply(a: u32, b: u32) -> u32 {
    let (mut product, mut shifted) = (0, b);
    let mut bit = 0;
    while bit < 32 {
        product ^= shifted & 0_u32.wrapping_sub(a >> (31 - bit) & 1);
        shifted = (shifted >> 1) ^ (POLYNOMIAL & 0_u32.wrapping_sub(shifted & 1));
        bit += 1;
    }
    product
}

/// What changes in a CRC when four bytes, `following` bytes before the end of the message, change by `diff`
/// (old xor new, in memory order). `following` is below 65,536. The result is xor-ed to the field as it
/// stands in memory.
#[inline(always)]
pub fn difference(diff: u32, following: u32) -> u32 {
    difference_by(multiply, diff, following)
}

/// The same with another [`multiply`]: the kernel's calls it as a separately verified function.
#[inline(always)]
pub fn difference_by(multiply: impl Fn(u32, u32) -> u32, diff: u32, following: u32) -> u32 {
    // The bytes' own CRC is their polynomial times x^32.
    let mut crc = multiply(u32::from_le_bytes(diff.to_ne_bytes()), X32);
    let mut k = 0;
    while k < 16 {
        crc = multiply(POWERS[k][(following >> k & 1) as usize], crc);
        k += 1;
    }
    u32::from_ne_bytes(crc.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    /// Bit by bit, from the definition.
    fn crc32c(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0, |mut crc, byte| {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ if crc & 1 != 0 { POLYNOMIAL } else { 0 };
            }
            crc
        })
    }

    #[test]
    fn the_definition_is_the_standard_s() {
        // RFC 3720 B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    proptest::proptest! {
        #[test]
        fn a_patched_crc_equals_one_from_scratch(
            head: u32, other: u32, tail in proptest::collection::vec(0_u8.., 0..3000)
        ) {
            let message = |head: u32| -> Vec<u8> { head.to_ne_bytes().into_iter().chain(tail.clone()).collect() };
            let field = u32::from_ne_bytes(crc32c(&message(head)).to_le_bytes());
            let patched = field ^ difference(head ^ other, tail.len() as u32);
            proptest::prop_assert_eq!(patched, u32::from_ne_bytes(crc32c(&message(other)).to_le_bytes()));
        }
    }
}
