//! Planted workspaces: the arrows of the design pass, each wrong one is found.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::point_one_way;

/// A workspace of these arrows (from, to, kind); every crate they name is a member.
fn workspace(arrows: &[(&str, &str, Option<&str>)]) -> Value {
    let names: BTreeSet<&str> = arrows
        .iter()
        .flat_map(|(from, to, _)| [*from, *to])
        .collect();
    let package = |name: &&str| {
        let dependencies: Vec<Value> = arrows
            .iter()
            .filter(|(from, ..)| from == name)
            .map(|(_, to, kind)| json!({ "name": to, "kind": kind }))
            .collect();
        json!({ "name": name, "dependencies": dependencies })
    };
    json!({ "packages": names.iter().map(package).collect::<Vec<Value>>() })
}

#[test]
fn the_arrows_of_the_design_are_allowed() {
    let metadata = workspace(&[
        ("eventbus", "eventbus-core", None),
        ("eventbus", "eventbus-macros", None),
        ("eventbus", "eventbus-kafka", None),
        ("eventbus", "eventbus-sql", None),
        ("eventbus", "eventbus-saga", None),
        ("eventbus", "eventbus-testkit", Some("dev")),
        ("eventbus-kafka", "eventbus-core", None),
        ("eventbus-kafka", "eventbus-testkit", Some("dev")),
        ("eventbus-testkit", "eventbus-core", None),
        ("eventbus-core", "eventbus-testkit", Some("dev")),
        ("eventbus-macros", "eventbus", Some("dev")),
        ("ecommerce", "eventbus", None),
        ("ecommerce", "eventbus-testkit", Some("dev")),
        ("eventbus-cli", "eventbus", None),
    ]);
    assert_eq!(point_one_way(&metadata), []);
}

#[test]
fn each_wrong_arrow_is_found() {
    for (from, to, kind) in [
        ("eventbus-kafka", "eventbus-redis", None),
        ("eventbus-kafka", "eventbus-sql", Some("dev")),
        ("eventbus-kafka", "eventbus", None),
        ("eventbus-saga", "eventbus-sql", None),
        ("eventbus-core", "eventbus-testkit", None),
        ("eventbus-core", "eventbus-testkit", Some("build")),
        ("eventbus-core", "eventbus-kafka", Some("dev")),
        ("eventbus-testkit", "eventbus", None),
        ("eventbus-macros", "eventbus-core", None),
        ("eventbus", "eventbus-testkit", None),
        ("eventbus", "eventbus-cli", None),
        ("ecommerce", "eventbus-core", None),
        ("ecommerce", "eventbus-testkit", None),
        ("eventbus-cli", "eventbus-kafka", None),
        ("eventbus-cli", "ecommerce", None),
        ("eventbus", "xtask", Some("dev")),
        ("eventbus-kafka", "xtask", Some("build")),
        ("xtask", "eventbus-core", None),
    ] {
        let findings = point_one_way(&workspace(&[(from, to, kind)]));
        assert_eq!(findings.len(), 1, "{from} -> {to} ({kind:?}): {findings:?}");
        assert_eq!(findings[0].place, from);
        assert!(findings[0].message.contains(to));
    }
}

#[test]
fn a_crate_without_a_role_is_found() {
    let findings = point_one_way(&workspace(&[("peers", "eventbus", None)]));
    assert_eq!(findings.len(), 1);
    assert_eq!(findings[0].place, "peers");
}

#[test]
fn dependencies_from_outside_the_workspace_are_no_arrows() {
    let metadata = json!({ "packages": [
        { "name": "eventbus-core", "dependencies": [{ "name": "tokio", "kind": null }] },
    ] });
    assert_eq!(point_one_way(&metadata), []);
}
