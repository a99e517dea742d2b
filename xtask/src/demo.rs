//! Whether the summary of `ecommerce demo --json` adds up. The demo itself lives in `examples/ecommerce`.

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Checks the last line of the demo's output; each entry of the answer is one thing that does not add up.
///
/// # Errors
/// When the last line is not a JSON object: then there is no summary to check.
pub(crate) fn check(output: &str) -> Result<Vec<String>> {
    let line = output
        .lines()
        .rfind(|line| !line.trim().is_empty())
        .context("the demo printed nothing")?;
    let summary: Value = serde_json::from_str(line)
        .with_context(|| format!("the last line of the demo is not JSON: {line}"))?;

    let mut findings = Vec::new();
    for (field, expected) in [
        ("unfinished", json!(0)),
        ("charges_twice", json!(0)),
        ("mails_twice", json!(0)),
        ("stock_conserved", json!(true)),
        ("money_conserved", json!(true)),
    ] {
        if summary[field] != expected {
            findings.push(format!(
                "{field} is {}, it must be {expected}",
                summary[field]
            ));
        }
    }
    findings.extend(orders(&summary));
    Ok(findings)
}

/// Every order placed must have ended one way or the other.
fn orders(summary: &Value) -> Option<String> {
    let count = |field: &str| summary[field].as_u64();
    let (Some(placed), Some(shipped), Some(cancelled)) =
        (count("placed"), count("shipped"), count("cancelled"))
    else {
        return Some("placed, shipped and cancelled must be whole numbers".to_owned());
    };
    // Zero orders would add up too, and show nothing.
    let adds_up = placed > 0 && shipped.checked_add(cancelled) == Some(placed);
    (!adds_up).then(|| format!("placed {placed} is not shipped {shipped} + cancelled {cancelled}"))
}

#[cfg(test)]
mod tests {
    use super::check;

    const GOOD: &str = r#"{"placed":3,"shipped":2,"cancelled":1,"unfinished":0,"charges_twice":0,"mails_twice":0,"stock_conserved":true,"money_conserved":true}"#;

    #[test]
    fn a_summary_that_adds_up_has_no_findings() {
        let output = format!("order 1 shipped\n{GOOD}\n\n");
        assert!(check(&output).unwrap().is_empty());
    }

    #[test]
    fn each_wrong_field_is_found() {
        for (right, wrong) in [
            (r#""shipped":2"#, r#""shipped":1"#),
            (r#""unfinished":0"#, r#""unfinished":1"#),
            (r#""charges_twice":0"#, r#""charges_twice":2"#),
            (r#""mails_twice":0,"#, ""),
            (r#""stock_conserved":true"#, r#""stock_conserved":false"#),
            (r#""money_conserved":true"#, r#""money_conserved":"true""#),
        ] {
            let findings = check(&GOOD.replace(right, wrong)).unwrap();
            assert_eq!(findings.len(), 1, "{wrong}: {findings:?}");
        }
    }

    #[test]
    fn a_demo_without_orders_shows_nothing() {
        let empty = GOOD
            .replace(r#""placed":3"#, r#""placed":0"#)
            .replace(r#""shipped":2"#, r#""shipped":0"#)
            .replace(r#""cancelled":1"#, r#""cancelled":0"#);
        assert_eq!(check(&empty).unwrap().len(), 1);
    }

    #[test]
    fn output_without_a_summary_is_an_error() {
        assert!(check("").is_err());
        assert!(check("all good, trust me").is_err());
    }
}
