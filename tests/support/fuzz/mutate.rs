//! Makes inputs out of other inputs by small random changes.

use crate::random::Random;

/// No input becomes longer than this: the longest one that `tests/fuzz/run` makes.
const LONGEST: usize = 16_384;
/// The most changes to one input.
const MAX_CHANGES: u64 = 8;
/// The most bytes that one change inserts or repeats.
const MAX_INSERTED: u64 = 32;

/// Numbers at which a parser changes its behaviour: limits of types and of block sizes, and the magic numbers of the
/// formats (replies and options of NBD, the superblock of thin metadata, the header of a snapshot's store).
const NUMBERS: [u64; 29] = [
    0,
    1,
    2,
    7,
    8,
    0x7f,
    0x80,
    0xff,
    512,
    4096,
    0x7fff,
    0xffff,
    1 << 20,
    (1 << 25) + 1,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 32,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    u64::MAX - 1,
    u64::MAX,
    0x6744_6698,
    0x668e_33ef,
    0x6e8a_278c,
    0x0003_e889_0455_65a9,
    0x4948_4156_454f_5054,
    27_022_010,
    0x7041_6e53,
];

/// One of `inputs`, which are not empty, with one or more changes. The same inputs and generator give the same result.
pub fn mutated(inputs: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut input = inputs[below(random, inputs.len())].clone();
    // Few changes are made most often, because most changes lead to the same early error.
    for _ in 0..random.within(1..MAX_CHANGES + 1).min(random.within(1..MAX_CHANGES + 1)) {
        change(&mut input, inputs, random);
        input.truncate(LONGEST);
    }
    input
}

fn change(input: &mut Vec<u8>, inputs: &[Vec<u8>], random: &mut Random) {
    let at = below(random, input.len() + 1);
    match random.within(0..8) {
        0 if at < input.len() => input[at] ^= 1 << random.within(0..8),
        1 => overwrite(input, at, &number(random)),
        2 => drop(input.splice(at..at, number(random))),
        3 => {
            let bytes: Vec<u8> =
                (0..random.within(1..MAX_INSERTED + 1)).map(|_| random.next().to_le_bytes()[0]).collect();
            input.splice(at..at, bytes);
        }
        4 => {
            let end = at + below(random, input.len() - at + 1);
            input.drain(at..end);
        }
        5 => {
            let end = input.len().min(at + 1 + below(random, MAX_INSERTED as usize));
            let repeated = input[at..end].to_vec();
            let place = below(random, input.len() + 1);
            input.splice(place..place, repeated);
        }
        6 => {
            let other = &inputs[below(random, inputs.len())];
            input.truncate(at);
            input.extend_from_slice(&other[below(random, other.len() + 1)..]);
        }
        _ => replace_decimal(input, at, random),
    }
}

/// Puts another decimal number in place of the first one at or after a position, if there is one.
fn replace_decimal(input: &mut Vec<u8>, at: usize, random: &mut Random) {
    if let Some(start) = input[at..].iter().position(u8::is_ascii_digit).map(|distance| at + distance) {
        let digits = input[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        let text = if random.one_in(8) { u128::MAX.to_string() } else { one_of_numbers(random).to_string() };
        input.splice(start..start + digits, text.into_bytes());
    }
}

/// One of the numbers, of 1, 2, 4 or 8 bytes, in either byte order.
fn number(random: &mut Random) -> Vec<u8> {
    let size = 1 << random.within(0..4);
    let mut bytes = one_of_numbers(random).to_le_bytes()[..size].to_vec();
    if random.one_in(2) {
        bytes.reverse();
    }
    bytes
}

fn one_of_numbers(random: &mut Random) -> u64 {
    NUMBERS[below(random, NUMBERS.len())]
}

/// Writes over the bytes from a position on, as far as there are any.
fn overwrite(input: &mut [u8], at: usize, bytes: &[u8]) {
    let len = bytes.len().min(input.len() - at);
    input[at..at + len].copy_from_slice(&bytes[..len]);
}

/// A number from zero to below `end`, which is not zero.
fn below(random: &mut Random, end: usize) -> usize {
    random.within(0..end as u64) as usize
}
