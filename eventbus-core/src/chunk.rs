//! Memory for small things that are written one after the other: those of a thread share pieces of it.

use std::cell::Cell;

use bytes::{Bytes, BytesMut};

/// How much is taken at once.
const CHUNK: usize = 64 * 1024;

/// What is larger has memory of its own: a small part that is kept does not keep much.
pub(crate) const SMALL: usize = 16 * 1024;

thread_local! {
    static REST: Cell<BytesMut> = Cell::default();
}

/// Takes what is left of the thread's memory, which is empty; [`give_back`] what is left after.
pub(crate) fn take() -> BytesMut {
    let rest = REST.take();
    match rest.capacity() {
        // It takes as much again by itself when it is used up.
        0 => BytesMut::with_capacity(CHUNK),
        _ => rest,
    }
}

/// Keeps what is left for what is written next.
pub(crate) fn give_back(mut rest: BytesMut) {
    rest.clear();
    REST.set(rest);
}

/// What `value` shows.
pub(crate) fn display(value: impl std::fmt::Display) -> Bytes {
    use std::fmt::Write as _;

    let mut chunk = take();
    // A `Display` that fails has written what it could, as in `to_string`, which panics.
    let written = write!(chunk, "{value}");
    let bytes = chunk.split().freeze();
    give_back(chunk);
    assert!(
        written.is_ok(),
        "a `Display` implementation returned an error"
    );
    bytes
}
