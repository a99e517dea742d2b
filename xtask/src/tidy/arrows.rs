//! The arrows between the crates: facade, then adapters, stores and mechanisms, then core. Looks at `cargo metadata` only.

use serde_json::Value;

use super::Finding;
use crate::workspace::packages;

/// What a crate is to the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// `eventbus`: re-exports behind features.
    Facade,
    /// An adapter, a store or a mechanism: every `eventbus-*` crate not named in [`ROLES`].
    Part,
    /// `eventbus-core`: contracts and runtime.
    Core,
    /// The derive.
    Macros,
    /// Conformance suites and the test bus.
    Testkit,
    /// Tries the SDK: its ledger and checks, and the runtime in virtual time.
    Trial,
    /// A program that uses the SDK as a service team does.
    Program,
    /// The program that harms services and judges what they did by its ledger.
    Campaign,
    /// The fuzz targets: they reach whatever reads bytes.
    Fuzz,
    /// This crate.
    Xtask,
}

/// The crates whose role is not plain from their name.
const ROLES: &[(&str, Role)] = &[
    ("eventbus", Role::Facade),
    ("eventbus-core", Role::Core),
    ("eventbus-macros", Role::Macros),
    ("eventbus-testkit", Role::Testkit),
    ("eventbus-simulation", Role::Trial),
    ("eventbus-verify", Role::Trial),
    ("eventbus-campaign", Role::Campaign),
    ("eventbus-cli", Role::Program),
    ("ecommerce", Role::Program),
    ("eventbus-fuzz", Role::Fuzz),
    ("xtask", Role::Xtask),
];

/// From whom, to whom in the build, and to whom in tests besides. What is not listed is not allowed.
const ARROWS: &[(Role, &[Role], &[Role])] = &[
    (
        Role::Facade,
        &[Role::Part, Role::Macros, Role::Core],
        &[Role::Testkit],
    ),
    (Role::Part, &[Role::Core], &[Role::Testkit]),
    (Role::Core, &[], &[Role::Testkit, Role::Macros]),
    // The derive is tested through the crates whose paths its output names.
    (Role::Macros, &[], &[Role::Core, Role::Facade]),
    (Role::Testkit, &[Role::Core], &[]),
    (
        Role::Trial,
        &[Role::Trial, Role::Testkit, Role::Core],
        &[Role::Testkit],
    ),
    (Role::Program, &[Role::Facade], &[Role::Testkit]),
    // The ledger and the fault proxy are what it does its work with.
    (
        Role::Campaign,
        &[Role::Facade, Role::Trial, Role::Testkit],
        &[],
    ),
    (
        Role::Fuzz,
        &[
            Role::Facade,
            Role::Part,
            Role::Trial,
            Role::Core,
            Role::Testkit,
        ],
        &[],
    ),
    (Role::Xtask, &[], &[]),
];

/// Finds every dependency between workspace crates that no arrow allows, and every crate without a role.
pub(super) fn point_one_way(metadata: &Value) -> Vec<Finding> {
    let members: Vec<&str> = packages(metadata)
        .filter_map(|package| package["name"].as_str())
        .collect();
    let mut findings = Vec::new();
    for package in packages(metadata) {
        let from = package["name"].as_str().unwrap_or_default();
        if role(from).is_none() {
            findings.push(Finding::new(
                from,
                "give this crate a role in xtask/src/tidy/arrows.rs",
            ));
            continue;
        }
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let to = dependency["name"].as_str().unwrap_or_default();
            let for_tests = dependency["kind"] == "dev";
            if members.contains(&to) && !is_allowed(from, to, for_tests) {
                findings.push(forbidden(from, to, for_tests));
            }
        }
    }
    findings
}

fn forbidden(from: &str, to: &str, for_tests: bool) -> Finding {
    let kind = if for_tests {
        "dev-dependency"
    } else {
        "dependency"
    };
    Finding::new(
        from,
        format!(
            "a {kind} on {to} points the wrong way: move what is shared into eventbus-core, or see ARROWS in xtask/src/tidy/arrows.rs"
        ),
    )
}

fn is_allowed(from: &str, to: &str, for_tests: bool) -> bool {
    let (Some(from), Some(to)) = (role(from), role(to)) else {
        return false;
    };
    ARROWS
        .iter()
        .filter(|(origin, ..)| *origin == from)
        .any(|(_, build, tests)| build.contains(&to) || (for_tests && tests.contains(&to)))
}

fn role(name: &str) -> Option<Role> {
    let listed = ROLES.iter().find(|(listed, _)| *listed == name);
    match listed {
        Some((_, role)) => Some(*role),
        None => name.starts_with("eventbus-").then_some(Role::Part),
    }
}

#[cfg(test)]
mod tests;
