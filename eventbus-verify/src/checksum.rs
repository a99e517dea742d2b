//! CRC-32C, over records and over payloads.

use crc::{CRC_32_ISCSI, Crc, Table};

/// The polynomial of Castagnoli, sixteen bytes a step.
const CASTAGNOLI: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

/// The CRC-32C of some bytes.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    CASTAGNOLI.checksum(bytes)
}

/// The CRC-32C of several pieces, as if they were one.
pub(crate) fn crc32c_of(pieces: &[&[u8]]) -> u32 {
    let mut digest = CASTAGNOLI.digest();
    for piece in pieces {
        digest.update(piece);
    }
    digest.finalize()
}

#[cfg(test)]
mod tests {
    use super::{crc32c, crc32c_of};

    #[test]
    fn the_known_answer_comes_out() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c_of(&[b"1234", b"", b"56789"]), 0xe306_9283);
    }
}
