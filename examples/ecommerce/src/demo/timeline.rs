//! One order's events as a tree: what caused what, when, and how long each step took.

use std::collections::HashMap;
use std::fmt::Write;

use super::history::Recorded;

/// Draws the events of one flow; `events` are in the order of their time.
pub fn draw(events: &[Recorded]) -> String {
    let known: HashMap<&str, &Recorded> = events
        .iter()
        .map(|event| (event.id.as_str(), event))
        .collect();
    let cause_of = |event: &Recorded| {
        let cause = event.cause.as_deref()?;
        known.get(cause).copied()
    };
    let mut drawing = Drawing {
        events,
        begin: events.first().map_or(0, |event| event.micros),
        text: format!(
            "{:>10}  {:<13} {:<42} {:>10}\n",
            "at", "service", "event", "step"
        ),
    };
    for root in events.iter().filter(|event| cause_of(event).is_none()) {
        drawing.line(root, None, "");
        drawing.consequences(root, "");
    }
    drawing.text
}

struct Drawing<'a> {
    events: &'a [Recorded],
    begin: i64,
    text: String,
}

impl<'a> Drawing<'a> {
    fn consequences(&mut self, cause: &'a Recorded, indent: &str) {
        let caused: Vec<&Recorded> = self
            .events
            .iter()
            .filter(|event| event.cause.as_deref() == Some(cause.id.as_str()))
            .collect();
        for (index, event) in caused.iter().enumerate() {
            let last = index + 1 == caused.len();
            let branch = if last { "└─ " } else { "├─ " };
            self.line(event, Some(cause), &format!("{indent}{branch}"));
            let below = if last { "   " } else { "│  " };
            self.consequences(event, &format!("{indent}{below}"));
        }
    }

    fn line(&mut self, event: &Recorded, cause: Option<&Recorded>, indent: &str) {
        let at = millis(event.micros - self.begin);
        let step = cause.map(|cause| millis(event.micros - cause.micros));
        let name = format!("{indent}{}", event.event_type);
        // Writing to a String cannot fail.
        let _ = writeln!(
            self.text,
            "{at:>10}  {:<13} {name:<42} {:>10}",
            event.source,
            step.unwrap_or_default()
        );
    }
}

fn millis(micros: i64) -> String {
    format!("{:.1} ms", micros as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: &str, cause: Option<&str>, event_type: &str, micros: i64) -> Recorded {
        Recorded {
            id: id.to_owned(),
            cause: cause.map(str::to_owned),
            event_type: event_type.to_owned(),
            source: "shop".to_owned(),
            micros,
            order_id: "1".to_owned(),
        }
    }

    #[test]
    fn consequences_stand_below_their_cause_with_the_time_they_took() {
        let drawn = draw(&[
            event("a", None, "OrderCreated", 1_000),
            event("b", Some("a"), "PaymentFailed", 2_500),
            event("c", Some("b"), "InventoryReleased", 3_000),
            event("d", Some("b"), "OrderCancelled", 4_000),
            event("e", Some("d"), "NotificationSent", 5_000),
        ]);
        let lines: Vec<&str> = drawn.lines().map(str::trim_end).collect();
        let names: Vec<&str> = lines
            .iter()
            .skip(1)
            .map(|line| line[26..].trim_start())
            .collect();
        assert!(names[0].starts_with("OrderCreated"));
        assert!(names[1].starts_with("└─ PaymentFailed"), "{drawn}");
        assert!(names[2].starts_with("├─ InventoryReleased"), "{drawn}");
        assert!(names[3].starts_with("└─ OrderCancelled"), "{drawn}");
        assert!(names[4].starts_with("└─ NotificationSent"), "{drawn}");
        assert!(lines[2].trim_start().starts_with("1.5 ms"), "{drawn}");
        assert!(lines[5].ends_with("1.0 ms"), "{drawn}");
    }
}
