//! Where reading starts and ends: what a group has committed, and the offsets of a time or an end.
//! These calls block; they run beside the runtime.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use eventbus_core::{Position, Result, Start, Topic, Until};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::client::patiently;
use crate::error::into_error;
use crate::lanes::{End, Place};

/// How long the coordinator of a group is looked for: the first one of a cluster takes seconds.
const COORDINATOR: Duration = Duration::from_secs(30);

/// A list of places, each at an offset.
pub(crate) fn list<'p>(
    places: impl IntoIterator<Item = (&'p Place, Offset)>,
) -> Result<TopicPartitionList, KafkaError> {
    let mut list = TopicPartitionList::new();
    for (place, offset) in places {
        list.add_partition_offset(place.topic.as_str(), place.partition, offset)?;
    }
    Ok(list)
}

/// The places of a list; topics that no topic of ours can be are none of ours.
pub(crate) fn places(list: &TopicPartitionList) -> Vec<Place> {
    let elements = list.elements();
    let places = elements.iter().filter_map(|element| {
        Some(Place {
            topic: Topic::new(element.topic()).ok()?,
            partition: element.partition(),
        })
    });
    places.collect()
}

/// What the consumer's group has committed at these places.
pub(crate) fn committed<C: ConsumerContext>(
    operation: &'static str,
    consumer: &BaseConsumer<C>,
    places: &[Place],
) -> Result<HashMap<Place, i64>> {
    let deadline = Instant::now() + COORDINATOR;
    let found = patiently(deadline, |left| {
        let asked = list(places.iter().map(|place| (place, Offset::Invalid)));
        let found = asked.and_then(|asked| consumer.committed_offsets(asked, left));
        let found = found.map_err(|error| into_error(operation, error))?;
        for element in found.elements() {
            element
                .error()
                .map_err(|error| into_error(operation, error))?;
        }
        Ok(found)
    })?;
    let mut offsets = HashMap::new();
    for element in found.elements() {
        if let (Offset::Offset(offset), Ok(topic)) = (element.offset(), Topic::new(element.topic()))
        {
            let place = Place {
                topic,
                partition: element.partition(),
            };
            offsets.insert(place, offset);
        }
    }
    Ok(offsets)
}

/// Commits offsets and waits for the coordinator's answer. As one who is no member it is taken only
/// while the group has none.
pub(crate) fn commit<C: ConsumerContext>(
    operation: &'static str,
    consumer: &BaseConsumer<C>,
    offsets: &[(Place, i64)],
) -> Result<()> {
    let offsets = offsets
        .iter()
        .map(|(place, offset)| (place, Offset::Offset(*offset)));
    let committed = list(offsets).and_then(|list| consumer.commit(&list, CommitMode::Sync));
    committed.map_err(|error| into_error(operation, error))
}

/// The first offset that is kept, and the one behind the last.
pub(crate) fn bounds<C: ConsumerContext>(
    operation: &'static str,
    consumer: &BaseConsumer<C>,
    place: &Place,
    deadline: Instant,
) -> Result<(i64, i64)> {
    patiently(deadline, |left| {
        let bounds = consumer.fetch_watermarks(place.topic.as_str(), place.partition, left);
        bounds.map_err(|error| {
            into_error(operation, error)
                .with("topic", &place.topic)
                .with("partition", place.partition)
        })
    })
}

/// The offsets of the first messages at or after a time; none where there is none.
fn at_time<C: ConsumerContext>(
    operation: &'static str,
    consumer: &BaseConsumer<C>,
    places: &[Place],
    time: i64,
    deadline: Instant,
) -> Result<HashMap<Place, i64>> {
    let found = patiently(deadline, |left| {
        let asked = list(places.iter().map(|place| (place, Offset::Offset(time))));
        let found = asked.and_then(|asked| consumer.offsets_for_times(asked, left));
        found.map_err(|error| into_error(operation, error))
    })?;
    let mut offsets = HashMap::new();
    for element in found.elements() {
        if let (Offset::Offset(offset), Ok(topic)) = (element.offset(), Topic::new(element.topic()))
        {
            let place = Place {
                topic,
                partition: element.partition(),
            };
            offsets.insert(place, offset);
        }
    }
    Ok(offsets)
}

/// Where reading starts at each place.
pub(crate) fn starts<C: ConsumerContext>(
    operation: &'static str,
    consumer: &BaseConsumer<C>,
    places: &[Place],
    start: Start,
    deadline: Instant,
) -> Result<Vec<(Place, i64)>> {
    let mut starts = Vec::with_capacity(places.len());
    for place in places {
        let (low, high) = bounds(operation, consumer, place, deadline)?;
        let offset = match start {
            Start::Latest | Start::Time(_) => high,
            // What is before the first message is a gap where that was asked for, and behind the
            // last one is its end.
            Start::Position(position) => offset(position).min(high),
            _ => low,
        };
        starts.push((place.clone(), offset));
    }
    if let Start::Time(time) = start {
        // Where no message is that late, the next one is the first: one that comes while this is
        // found out lies behind the ends that were asked for before.
        let times = at_time(operation, consumer, places, millis(time), deadline)?;
        for (place, offset) in &mut starts {
            *offset = times.get(place).copied().unwrap_or(*offset);
        }
    }
    Ok(starts)
}

/// Where reading ends at each place; `None` at a time that is still to come.
pub(crate) fn ends<C: ConsumerContext>(
    operation: &'static str,
    consumer: &BaseConsumer<C>,
    places: &[Place],
    until: Until,
    deadline: Instant,
) -> Result<Option<Vec<(Place, End)>>> {
    if matches!(until, Until::Time(time) if time > SystemTime::now()) {
        return Ok(None);
    }
    let mut ends = Vec::with_capacity(places.len());
    for place in places {
        let (_, high) = bounds(operation, consumer, place, deadline)?;
        let offset = match until {
            Until::Position(position) => offset(position),
            _ => high,
        };
        let is_reached = offset <= high;
        ends.push((place.clone(), End { offset, is_reached }));
    }
    if let Until::Time(time) = until {
        // Asked for after the ends, as where reading starts: what comes meanwhile is too late.
        let times = at_time(operation, consumer, places, millis(time), deadline)?;
        for (place, end) in &mut ends {
            end.offset = times.get(place).copied().unwrap_or(end.offset);
        }
    }
    Ok(Some(ends))
}

pub(crate) fn millis(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    // The first whole millisecond that is not before it.
    i64::try_from(since.as_nanos().div_ceil(1_000_000)).unwrap_or(i64::MAX)
}

pub(crate) fn offset(position: Position) -> i64 {
    i64::try_from(position.0).unwrap_or(i64::MAX)
}
