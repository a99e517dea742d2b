//! A configuration as a file and the environment give it.

use eventbus::EventBusConfig;
use eventbus_core::ErrorKind;

use crate::Target;
use crate::urls::SECRET;

pub(crate) const TARGET: Target = Target {
    name: "configuration",
    run,
    words: &[
        "url = \"memory:\"\n",
        "url = \"kafka://user:hunter2@host/\"\n",
        "source = \"orders\"\n",
        "topic_prefix = \"staging.\"\n",
        "\n----\n",
        "EVENTBUS_URL=memory:\n",
        "EVENTBUS_SOURCE=orders\n",
        "EVENTBUS_TOPIC_PREFIX=staging.\n",
        "EVENTBUS_URI=memory:\n",
        "EVENTBUS_SERVICE_HOST=10.0.0.1\n",
        "EVENTBUS_PORT_80_TCP=x\n",
        "EVENTBUS_",
        "[[[[[[[[",
    ],
    cost: 2,
};

/// A file, and behind a line of dashes the environment, a variable a line.
fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let (file, environment) = text.split_once("\n----\n").unwrap_or((text, ""));
    let config = match toml::from_str::<EventBusConfig>(file) {
        Ok(config) => config,
        Err(_) => EventBusConfig::new("memory:"),
    };
    let variables = environment.lines().filter_map(|line| line.split_once('='));
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
    match config.overridden_by(variables) {
        Ok(config) => {
            assert!(!config.url.is_empty());
            let shown = format!("{config:?}");
            let is_hidden = config.url.ends_with("user:hunter2@host/") && hides(&config);
            assert!(!is_hidden || !shown.contains(SECRET), "{shown}");
        }
        Err(error) => assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}"),
    }
}

/// Whether the secret stands nowhere but in the URL's user.
fn hides(config: &EventBusConfig) -> bool {
    let source = config.source.as_deref().unwrap_or_default();
    // A secret in the store's URL need not stand where passwords do.
    let store = config.store.as_deref().unwrap_or_default();
    let open = [source, &config.topic_prefix, store];
    config.url.matches(SECRET).count() == 1 && open.iter().all(|text| !text.contains(SECRET))
}
