//! The Python programs of a shop, for the examples of seeds 000 and 001: they run as they are, and are
//! told by their environment where RabbitMQ is.

use std::time::Duration;

use eventbus::BoxError;
use tokio::process::Command;

/// Where RabbitMQ is; without it the example says how to start one, and ends.
pub(crate) fn url() -> String {
    std::env::var("EVENTBUS_URL")
        .ok()
        .filter(|url| url.starts_with("amqp"))
        .unwrap_or_else(|| {
            eprintln!(
                "this example needs RabbitMQ: start one with `export $(dev/brokers up rabbitmq)` and run it again \
                 with EVENTBUS_URL=$EVENTBUS_TEST_RABBITMQ, or set EVENTBUS_URL to another one's amqp:// URL"
            );
            std::process::exit(2)
        })
}

/// Runs one of the programs beside this file, and gives what it printed.
pub(crate) async fn run(program: &str, arguments: &[&str]) -> Result<String, BoxError> {
    let python = std::env::var("PYTHON").unwrap_or("python3".into());
    let file = format!("{}/examples/seeds/{program}", env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(python)
        .arg(file)
        .args(arguments)
        .env("RABBITMQ_URL", url())
        .output()
        .await?;
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout)?),
        false => Err(format!(
            "{program} failed, perhaps because Python lacks pika (`pip install pika`): {}",
            String::from_utf8_lossy(&output.stderr)
        )
        .into()),
    }
}

/// Waits until something is so.
pub(crate) async fn until(mut is_so: impl FnMut() -> bool) {
    while !is_so() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
