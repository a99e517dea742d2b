"""The official CloudEvents SDK for Python; tests/it/python.rs runs it.

    sdk.py write    prints what the SDK writes of the events below, by name
    sdk.py read     prints the events that the SDK reads from the messages on stdin

A message is {"binding", "headers", "payload"}, an event {"attributes", "data"}. Bytes that are no text are hexadecimal,
those of a payload as "bytes".
"""

import json
import sys
from datetime import datetime, timezone

from cloudevents.core.bindings import amqp, http, kafka, rabbitmq
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

FORMAT = JSONFormat()
DATA = {"order_id": 123, "amount": 250, "note": "zwölf Gläser ☕"}


def event(data=DATA, **attributes):
    return CloudEvent(
        {
            "id": "A234-1234-1234",
            "source": "/shop/orders",
            "type": "OrderCreated",
            "time": datetime(2026, 11, 21, 7, 0, 0, 123456, timezone.utc),
            "datacontenttype": "application/json",
            "subject": "order/123",
            "tenant": "Zürich & Söhne",
            "sampledrate": 30,
            **attributes,
        },
        data,
    )


def message(headers, payload):
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        text = "\0"
    return {"headers": headers, **({"payload": text} if text.isprintable() else {"bytes": payload.hex()})}


def plain(headers):
    return {name: value if isinstance(value, str) else value.decode() for name, value in headers.items()}


def of_kafka(sent):
    return message(plain(sent.headers), sent.value)


def of_amqp(sent):
    headers = dict(sent.application_properties)
    # An adapter gives native values in their canonical form.
    if "cloudEvents_time" in headers:
        time = datetime.fromtimestamp(headers["cloudEvents_time"] / 1000, timezone.utc)
        headers["cloudEvents_time"] = time.isoformat().replace("+00:00", "Z")
    headers = {name: str(value) for name, value in headers.items()}
    headers["content-type"] = sent.properties["content-type"]
    return message(headers, sent.application_data)


def of_rabbitmq(sent):
    return message({**sent.headers, "content-type": sent.content_type}, sent.body)


def of_http(sent):
    return message(plain(sent.headers), sent.body)


def write():
    uuid = "5c1b2f0e-9a63-4f0e-8f5e-0a3f7c9d1b22"
    flow = {"correlationid": "request-7", "causationid": "A234-1234-1233"}
    colons = of_amqp(amqp.to_binary(event(), FORMAT))
    colons["headers"] = {name.replace("cloudEvents_", "cloudEvents:"): value for name, value in colons["headers"].items()}
    text = event("12 glasses", datacontenttype="text/plain")
    return {
        "kafka_structured": of_kafka(kafka.to_structured(event(id=uuid, partitionkey="123", **flow), FORMAT)),
        "kafka_structured_bytes": of_kafka(
            kafka.to_structured(event(b"\x00\x01\xff", datacontenttype="application/avro"), FORMAT)
        ),
        "kafka_structured_text": of_kafka(kafka.to_structured(text, FORMAT)),
        "kafka_binary": of_kafka(kafka.to_binary(event(id=uuid, **flow), FORMAT)),
        "kafka_binary_bytes": of_kafka(
            kafka.to_binary(event(b"\x00\x01\x7f", datacontenttype="application/avro"), FORMAT)
        ),
        "amqp_structured": of_amqp(amqp.to_structured(event(), FORMAT)),
        "amqp_binary": of_amqp(amqp.to_binary(event(), FORMAT)),
        "amqp_binary_colons": colons,
        "rabbitmq_binary": of_rabbitmq(rabbitmq.to_binary(event(), FORMAT)),
        "http_binary": of_http(http.to_binary(event(), FORMAT)),
    }


def read_one(sent):
    headers = sent["headers"]
    payload = bytes.fromhex(sent["bytes"]) if "bytes" in sent else sent["payload"].encode()
    if sent["binding"] == "kafka":
        headers = {name: value.encode() for name, value in headers.items()}
        found = kafka.from_kafka(kafka.KafkaMessage(headers, None, payload), FORMAT)
    else:
        properties = {"content-type": headers.pop("content-type")}
        found = amqp.from_amqp(amqp.AMQPMessage(properties, headers, payload), FORMAT)
    attributes = {
        name: value.isoformat() if isinstance(value, datetime) else value
        for name, value in found.get_attributes().items()
    }
    data = found.get_data()
    if isinstance(data, bytes):
        data = {"bytes": data.hex()}
    return {"attributes": attributes, "data": data}


def main():
    match sys.argv[1:]:
        case ["write"]:
            answer = write()
        case ["read"]:
            answer = [read_one(sent) for sent in json.load(sys.stdin)]
        case _:
            raise SystemExit(__doc__)
    json.dump(answer, sys.stdout, ensure_ascii=False, indent=2)
    print()


main()
