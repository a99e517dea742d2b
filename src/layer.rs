//! What a [`tower::Layer`](https://docs.rs/tower-layer) around handlers meets: the request and the
//! service that dispatches it.

pub use eventbus_core::{Dispatch, DispatchFuture, Request};
