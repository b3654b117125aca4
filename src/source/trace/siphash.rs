//! SipHash-2-4 with a result of 128 bits (<https://www.aumasson.jp/siphash/siphash.pdf>). The standard library's hash has 64
//! bits, and may be another one in its next version.

/// The four words of the state.
struct State([u64; 4]);

impl State {
    fn rounds(&mut self, count: u32) {
        let [v0, v1, v2, v3] = &mut self.0;
        for _ in 0..count {
            *v0 = v0.wrapping_add(*v1);
            *v1 = v1.rotate_left(13) ^ *v0;
            *v0 = v0.rotate_left(32);
            *v2 = v2.wrapping_add(*v3);
            *v3 = v3.rotate_left(16) ^ *v2;
            *v0 = v0.wrapping_add(*v3);
            *v3 = v3.rotate_left(21) ^ *v0;
            *v2 = v2.wrapping_add(*v1);
            *v1 = v1.rotate_left(17) ^ *v2;
            *v2 = v2.rotate_left(32);
        }
    }

    fn add(&mut self, word: u64) {
        self.0[3] ^= word;
        self.rounds(2);
        self.0[0] ^= word;
    }

    fn result(&self) -> u64 {
        self.0.iter().fold(0, |sum, word| sum ^ word)
    }
}

/// The hash of `bytes` with a key. The lower half of the key and of the result is the first word of the specification.
pub(super) fn siphash(key: u128, bytes: &[u8]) -> u128 {
    const WORD: usize = 8;
    let [low, high] = [key as u64, (key >> 64) as u64];
    let mut state = State([
        low ^ 0x736f_6d65_7073_6575,
        high ^ 0x646f_7261_6e64_6f6d ^ 0xee,
        low ^ 0x6c79_6765_6e65_7261,
        high ^ 0x7465_6462_7974_6573,
    ]);
    let (words, rest) = bytes.as_chunks::<WORD>();
    words.iter().for_each(|word| state.add(u64::from_le_bytes(*word)));
    let mut last = [0; WORD];
    last[..rest.len()].copy_from_slice(rest);
    // The lowest byte of the length.
    last[WORD - 1] = bytes.len().to_le_bytes()[0];
    state.add(u64::from_le_bytes(last));
    state.0[2] ^= 0xee;
    state.rounds(4);
    let first = state.result();
    state.0[1] ^= 0xdd;
    state.rounds(4);
    u128::from(first) | u128::from(state.result()) << 64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first test vectors of the reference implementation: the key is 00 01 .. 0f, the input 00 01 .. of each length.
    #[test]
    fn the_vectors_of_the_reference_implementation() {
        let key = u128::from_le_bytes(std::array::from_fn(|at| at as u8));
        let input: Vec<u8> = (0..64).collect();
        for (len, expected) in [
            (0, 0xa3817f04ba25a8e66df67214c7550293_u128),
            (1, 0xda87c1d86b99af44347659119b22fc45),
            (2, 0x8177228da4a45dc7fca38bdef60affe4),
            (3, 0x9c70b60c5267a94e5f33b6b02985ed51),
        ] {
            assert_eq!(siphash(key, &input[..len]).to_le_bytes(), expected.to_be_bytes(), "{len}");
        }
        let hashes: std::collections::HashSet<_> = (0..64).map(|len| siphash(key, &input[..len])).collect();
        assert_eq!(hashes.len(), 64);
    }
}
