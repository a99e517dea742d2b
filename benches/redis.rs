//! The bus on Redis beside its client as one would use it by hand, on the same server, the same bytes,
//! interleaved in one run: publishing, and consuming a backlog with one handler, with 64 keys at once,
//! and in batches. Prints rates, processor time of the client a message, and the ratios of pairs.
//!
//! `export $(dev/brokers up redis); cargo bench -p eventbus --features redis --bench redis`
//! (PAIRS=9 for more pairs, MESSAGES=300000 for a longer run, ONLY=publish for one comparison, and
//! ARM=bus or ARM=raw for one side alone, which is for a profiler and says nothing about speed)
//!
//! By hand means: pipelines of 200 XADD with the same fields, several under way; XREAD of 500 entries
//! of each stream, whose fields are looked at as they come, the next ones being read while these are
//! decoded, and the position stored with each read. Both encode and decode the payload, and send the
//! headers; by hand nobody reads those.

#[path = "load/pairs.rs"]
mod pairs;

use eventbus::{EventBus, Message, RedisBroker};
use futures_util::StreamExt;
use pairs::{Arm, Comparison, Envelope, Figure, OrderCreated, Watch, What, fill, number, order};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Pipeline, Value};

/// As many as our defaults create.
const PARTITIONS: u32 = 4;
/// By hand: messages of a pipeline, pipelines under way, entries of a stream that are read at once.
const PIPELINE: usize = 200;
const PIPELINES_AT_ONCE: usize = 4;
const READ: usize = 500;

/// What is compared, and the least ratio of rates that its upper bound has to reach.
const COMPARISONS: &[Comparison] = &[
    (What::Publish, "publish", 0.95),
    (What::Handler, "consume, one handler", 0.95),
    (What::Slots, "consume, 64 keys at once", 0.80),
    (What::Batches, "consume, batches of 256", 0.95),
];

fn main() {
    let messages = number("MESSAGES").unwrap_or(200_000);
    let url = std::env::var("EVENTBUS_TEST_REDIS").expect("export $(dev/brokers up redis)");
    pairs::runtime().block_on(async {
        let bench = Bench::new(&url, messages).await;
        pairs::compare(COMPARISONS, &bench.sample, messages, |arm, what| {
            bench.run(arm, what)
        })
        .await;
        bench.remove(&["read", "written"]).await;
    });
}

struct Bench {
    client: redis::Client,
    /// A backlog is there.
    backlog: EventBus,
    /// Published to, and never read.
    sink: EventBus,
    messages: usize,
    /// A message as the bus makes it: by hand the same headers are sent.
    sample: Message,
}

fn stream(what: &str, partition: u32) -> String {
    format!("bench-{what}-{}-orders:{partition}", std::process::id())
}

impl Bench {
    async fn new(url: &str, messages: usize) -> Self {
        let bus = |what: &str| {
            let prefix = format!("bench-{what}-{}-", std::process::id());
            async move {
                let broker = RedisBroker::from_url(url).await.expect("it answers");
                EventBus::builder(broker).topic_prefix(prefix).build()
            }
        };
        let (backlog, sink) = (bus("read").await, bus("written").await);
        fill(&backlog, messages).await;
        Self {
            client: redis::Client::open(url).expect("a good url"),
            sample: pairs::sample().await,
            backlog,
            sink,
            messages,
        }
    }

    async fn connect(&self) -> MultiplexedConnection {
        // On a busy machine the server may take longer than the half second of the default.
        let config = AsyncConnectionConfig::new().set_response_timeout(None);
        let client = &self.client;
        let connection = client.get_multiplexed_async_connection_with_config(&config);
        connection.await.expect("it answers")
    }

    async fn run(&self, arm: Arm, what: What) -> Figure {
        let figure = match (arm, what) {
            (Arm::Raw, What::Publish) => self.raw_publish().await,
            (Arm::Raw, _) => self.raw_consume().await,
            (Arm::Bus, What::Publish) => pairs::publish(&self.sink, self.messages).await,
            (Arm::Bus, what) => {
                let group = format!("bench-bus-{}", fastrand::u64(..));
                pairs::consume(&self.backlog, &group, self.messages, what).await
            }
        };
        if what == What::Publish {
            // The server has memory, no disk.
            self.remove(&["written"]).await;
        }
        figure
    }

    async fn remove(&self, whats: &[&str]) {
        let mut connection = self.connect().await;
        for what in whats {
            for partition in 0..PARTITIONS {
                let mut unlink = redis::cmd("UNLINK");
                unlink.arg(stream(what, partition));
                let removed = unlink.query_async(&mut connection).await;
                let _: i64 = removed.expect("it answers");
            }
        }
    }

    async fn raw_publish(&self) -> Figure {
        let streams: Vec<String> = (0..PARTITIONS).map(|it| stream("written", it)).collect();
        let lines = lines(&self.sample);
        let mut envelope: Envelope<OrderCreated> =
            serde_json::from_slice(&self.sample.payload).expect("it is JSON");
        let connection = self.connect().await;
        let watch = Watch::start();
        let pipelines = (0..self.messages).step_by(PIPELINE).map(|first| {
            let mut pipeline = Pipeline::with_capacity(PIPELINE);
            for number in first..self.messages.min(first + PIPELINE) {
                envelope.data = order(number as u64);
                let payload = serde_json::to_vec(&envelope).expect("it is JSON");
                let key = envelope.data.order_id.to_string();
                let stream = &streams[number % streams.len()];
                pipeline.cmd("XADD").arg(stream).arg("*");
                pipeline.arg("data").arg(payload).arg("key").arg(key);
                pipeline.arg("eb-headers").arg(&lines);
            }
            let mut connection = connection.clone();
            async move {
                let ids: Vec<Value> = pipeline.query_async(&mut connection).await.expect("taken");
                assert!(ids.iter().all(|id| matches!(id, Value::BulkString(_))));
            }
        });
        let mut sent = futures_util::stream::iter(pipelines).buffered(PIPELINES_AT_ONCE);
        while sent.next().await.is_some() {}
        watch.figure(self.messages)
    }

    async fn raw_consume(&self) -> Figure {
        let connection = self.connect().await;
        let positions = format!("bench-positions-{}", fastrand::u64(..));
        let mut after = vec![String::from("0"); PARTITIONS as usize];
        let mut reading = tokio::spawn(read(connection.clone(), positions.clone(), after.clone()));
        let (mut read_to, mut watch) = (0, None);
        while read_to < self.messages {
            let page = reading.await.expect("it does not panic");
            for (partition, entries) in page.iter().enumerate() {
                if let Some((id, _)) = entries.last().map(entry) {
                    after[partition] = id;
                }
            }
            // The next ones are read while these are decoded.
            let next = read(connection.clone(), positions.clone(), after.clone());
            reading = tokio::spawn(next);
            for found in page.iter().flatten() {
                let watch = watch.get_or_insert_with(Watch::start);
                let (_, payload) = entry(found);
                let envelope: Envelope<OrderCreated> =
                    serde_json::from_slice(payload).expect("it is JSON");
                std::hint::black_box((&envelope, &watch));
                read_to += 1;
            }
        }
        let figure = watch.expect("there were some").figure(self.messages);
        let last = reading.await.expect("it does not panic");
        assert!(last.iter().all(Vec::is_empty), "there were no more");
        let mut connection = connection;
        let mut unlink = redis::cmd("UNLINK");
        unlink.arg(&positions);
        let removed = unlink.query_async(&mut connection).await;
        let _: i64 = removed.expect("it answers");
        figure
    }
}

/// The next entries of each stream, after storing how far they were handled.
async fn read(
    mut connection: MultiplexedConnection,
    positions: String,
    after: Vec<String>,
) -> Vec<Vec<Value>> {
    let mut pipeline = Pipeline::new();
    pipeline.cmd("HSET").arg(positions);
    for (partition, after) in after.iter().enumerate() {
        pipeline.arg(partition).arg(after);
    }
    pipeline.ignore();
    for (partition, after) in after.iter().enumerate() {
        pipeline.cmd("XREAD").arg("COUNT").arg(READ).arg("STREAMS");
        pipeline.arg(stream("read", partition as u32)).arg(after);
    }
    let replies: Vec<Value> = pipeline
        .query_async(&mut connection)
        .await
        .expect("it answers");
    replies.into_iter().map(entries).collect()
}

fn entries(reply: Value) -> Vec<Value> {
    let Value::Array(mut streams) = reply else {
        return Vec::new();
    };
    match streams.pop() {
        Some(Value::Array(mut stream)) => match stream.pop() {
            Some(Value::Array(entries)) => entries,
            _ => panic!("entries are an array"),
        },
        _ => panic!("a stream has a name and entries"),
    }
}

/// Its id and its payload.
fn entry(entry: &Value) -> (String, &[u8]) {
    let Value::Array(parts) = entry else {
        panic!("an entry is an array")
    };
    let [Value::BulkString(id), Value::Array(fields)] = parts.as_slice() else {
        panic!("an entry has an id and fields")
    };
    let mut fields = fields.chunks_exact(2);
    let payload = fields.find_map(|field| match field {
        [Value::BulkString(name), Value::BulkString(value)] if name == b"data" => Some(value),
        _ => None,
    });
    let id = String::from_utf8_lossy(id).into_owned();
    (id, payload.expect("it has a payload"))
}

/// The headers as one field.
fn lines(message: &Message) -> Vec<u8> {
    let headers = message.headers.iter();
    let lines = headers.flat_map(|(name, value)| [name.as_bytes(), b": ", value, b"\n"].concat());
    lines.collect()
}
