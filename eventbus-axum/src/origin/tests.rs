//! What becomes of the headers of a request.

use axum::http::Request;

use super::*;

async fn origin_of(headers: &[(&str, &str)]) -> Result<Origin, BadOrigin> {
    let mut request = Request::builder();
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let (mut parts, ()) = request.body(()).unwrap().into_parts();
    let extracted = RequestOrigin::from_request_parts(&mut parts, &()).await;
    extracted.map(|RequestOrigin(origin)| origin)
}

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[tokio::test]
async fn headers_become_the_origin() {
    let origin = origin_of(&[
        ("X-Correlation-Id", "req-9"),
        ("X-User-Id", "u-17"),
        ("X-Session-Id", "s-4"),
        ("traceparent", TRACEPARENT),
        ("tracestate", "congo=t61rcWkgMzE"),
    ]);
    let expected = Origin::new()
        .with_correlation_id("req-9")
        .with_metadata("userId", "u-17")
        .with_metadata("sessionId", "s-4")
        .with_traceparent(TRACEPARENT)
        .with_tracestate("congo=t61rcWkgMzE");
    assert_eq!(origin.await, Ok(expected));
    assert_eq!(origin_of(&[]).await, Ok(Origin::new()));
}

#[tokio::test]
async fn a_header_that_no_event_can_carry_is_refused_by_name() {
    let long = "x".repeat(LENGTH_MAX + 1);
    for (name, value) in [
        ("x-user-id", ""),
        ("x-session-id", long.as_str()),
        ("x-correlation-id", "é"),
    ] {
        let refused = origin_of(&[(name, value)]).await.unwrap_err();
        assert_eq!(refused.header, name);
        assert!(refused.to_string().contains(name), "{refused}");
        assert_eq!(refused.into_response().status(), StatusCode::BAD_REQUEST);
    }
}

#[tokio::test]
async fn an_invalid_trace_context_is_left_out() {
    let zeros = TRACEPARENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32));
    let upper = TRACEPARENT.to_uppercase();
    for invalid in ["", "00", &zeros, &upper, &format!("{TRACEPARENT}-00")] {
        let origin = origin_of(&[("traceparent", invalid), ("tracestate", "congo=1")]).await;
        assert_eq!(origin, Ok(Origin::new()), "{invalid}");
    }
    let long = "x".repeat(TRACESTATE_LENGTH_MAX + 1);
    let origin = origin_of(&[("traceparent", TRACEPARENT), ("tracestate", &long)]).await;
    let expected = Origin::new().with_traceparent(TRACEPARENT);
    assert_eq!(origin, Ok(expected));
}
