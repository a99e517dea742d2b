//! Memory for small things that are written one after the other: those of a thread share pieces of it.

use std::cell::Cell;

use bytes::{Bytes, BytesMut};

/// How much is taken at once, and so the most that something small keeps.
const CHUNK: usize = 8 * 1024;

/// What is larger has memory of its own.
const SMALL: usize = 2 * 1024;

thread_local! {
    static REST: Cell<BytesMut> = Cell::default();
}

/// Takes what is left of the thread's memory, which is empty; [`give_back`] what is left after.
pub(crate) fn take() -> BytesMut {
    // While a thread ends it has none any more.
    let rest = REST.try_with(Cell::take).unwrap_or_default();
    match rest.capacity() {
        // It takes as much again by itself when it is used up.
        0 => BytesMut::with_capacity(CHUNK),
        _ => rest,
    }
}

/// Keeps what is left for what is written next.
pub(crate) fn give_back(mut rest: BytesMut) {
    // It grew under something large.
    if rest.capacity() > CHUNK {
        return;
    }
    rest.clear();
    let _ = REST.try_with(|kept| kept.set(rest));
}

/// What `fill` writes, which is about so many bytes.
pub(crate) fn write<E>(
    about: usize,
    fill: impl FnOnce(&mut BytesMut) -> Result<(), E>,
) -> Result<Bytes, E> {
    let mut chunk = match about > SMALL {
        true => BytesMut::with_capacity(about),
        false => take(),
    };
    fill(&mut chunk)?;
    if chunk.len() > SMALL {
        return Ok(chunk.freeze());
    }
    let bytes = chunk.split().freeze();
    give_back(chunk);
    Ok(bytes)
}

/// What `value` shows.
///
/// # Panics
///
/// When its `Display` answers an error, as in `to_string`.
pub(crate) fn display(value: impl std::fmt::Display) -> Bytes {
    use std::fmt::Write as _;

    let shown = write(0, |chunk| write!(chunk, "{value}"));
    shown.expect("a `Display` implementation returned an error")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_small_shares_memory_and_what_is_large_keeps_its_own() {
        give_back(BytesMut::new());
        let (first, second) = (display("one"), display("two"));
        assert_eq!((&first[..], &second[..]), (&b"one"[..], &b"two"[..]));
        assert_eq!(first.as_ptr().wrapping_add(3), second.as_ptr());
        let large = display("x".repeat(10 * CHUNK));
        assert_eq!(large.len(), 10 * CHUNK);
        assert!(take().capacity() <= CHUNK, "nothing large is kept");
    }
}
