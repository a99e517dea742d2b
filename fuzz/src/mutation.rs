//! Makes new inputs out of those there are: a small mutator for toolchains without libFuzzer.

use fastrand::Rng;

/// Longest input that is made.
const BYTES_MAX: usize = 16 * 1024;

/// Numbers at which arithmetic and lengths go wrong.
const NUMBERS: [&str; 8] = [
    "0",
    "-1",
    "255",
    "65536",
    "4294967295",
    "9223372036854775807",
    "18446744073709551615",
    "340282366920938463463374607431768211456",
];

/// Bytes that mean something to many readers.
const BYTES: [u8; 12] = [
    0, 1, 0x7f, 0x80, 0xff, b'\n', b' ', b'"', b'{', b':', b'%', b'@',
];

/// A source of inputs: the same seed makes the same ones.
#[derive(Debug)]
pub struct Mutation<'c> {
    random: Rng,
    corpus: &'c [Vec<u8>],
    words: &'c [&'c str],
}

impl<'c> Mutation<'c> {
    /// Makes inputs of a corpus, and of words.
    #[must_use]
    pub fn new(seed: u64, corpus: &'c [Vec<u8>], words: &'c [&'c str]) -> Self {
        Self {
            random: Rng::with_seed(seed),
            corpus,
            words,
        }
    }

    /// The next input.
    pub fn next_input(&mut self) -> Vec<u8> {
        let mut input = match self.corpus {
            [] => Vec::new(),
            corpus => corpus[self.random.usize(..corpus.len())].clone(),
        };
        // Mostly few changes: an input that is all noise is refused at its first byte.
        let changes = 1 + self.random.usize(..8).min(self.random.usize(..8));
        for _ in 0..changes {
            self.change(&mut input);
        }
        input.truncate(BYTES_MAX);
        input
    }

    fn change(&mut self, input: &mut Vec<u8>) {
        let at = self.random.usize(..=input.len());
        let end = at + self.random.usize(..=(input.len() - at).min(64));
        match self.random.u8(..12) {
            0 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte ^= 1 << self.random.u8(..8);
                }
            }
            1 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = self.byte();
                }
            }
            2 => {
                input.drain(at..end);
            }
            3 => {
                let part = input[at..end].to_vec();
                insert(input, at, &part);
            }
            4 => input.truncate(at),
            5 | 6 => insert(input, at, self.word().as_bytes()),
            7 => {
                let word = self.word().as_bytes();
                let end = (at + word.len()).min(input.len());
                input.splice(at..end, word.iter().copied());
            }
            8 => self.renumber(input, at),
            9 => {
                let byte = self.byte();
                let count = 1 << self.random.u32(..12);
                insert(input, at, &vec![byte; count]);
            }
            10 => self.cross(input, at),
            _ => {
                let byte = self.byte();
                insert(input, at, &[byte]);
            }
        }
    }

    fn byte(&mut self) -> u8 {
        match self.random.bool() {
            true => BYTES[self.random.usize(..BYTES.len())],
            false => self.random.u8(..),
        }
    }

    fn word(&mut self) -> &'c str {
        match self.words {
            [] => "",
            words => words[self.random.usize(..words.len())],
        }
    }

    /// Replaces the number behind a place, if there is one.
    fn renumber(&mut self, input: &mut Vec<u8>, at: usize) {
        let digits = |bytes: &[u8]| {
            bytes
                .iter()
                .take_while(|byte| byte.is_ascii_digit())
                .count()
        };
        let Some(begin) = input[at..].iter().position(u8::is_ascii_digit) else {
            return;
        };
        let begin = at + begin;
        let end = begin + digits(&input[begin..]);
        let number = NUMBERS[self.random.usize(..NUMBERS.len())];
        input.splice(begin..end, number.bytes());
    }

    /// Goes on as another input does.
    fn cross(&mut self, input: &mut Vec<u8>, at: usize) {
        let Some(other) = self.random.choice(self.corpus) else {
            return;
        };
        let from = self.random.usize(..=other.len());
        input.truncate(at);
        input.extend_from_slice(&other[from..]);
    }
}

fn insert(input: &mut Vec<u8>, at: usize, part: &[u8]) {
    input.splice(at..at, part.iter().copied());
}
