//! The simulation finds nothing in the SDK, and every planted bug.

mod plants;
mod seeds;
