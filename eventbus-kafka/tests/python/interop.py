"""Clients of Kafka that are not ours; tests/it/python.rs runs it.

    interop.py SERVERS read TOPIC COUNT    prints every message of a topic
    interop.py SERVERS publish TOPIC       publishes the messages on stdin, prints where each went

Messages are JSON, bytes in them hexadecimal, and null where there are none. The client is confluent-kafka, or
kafka-python where that refuses to say a message.
"""

import json
import sys
import time

from confluent_kafka import Consumer, Producer, TopicPartition
from kafka import KafkaProducer

PATIENCE = 30


def read(servers, topic, count):
    consumer = Consumer({
        "bootstrap.servers": servers,
        "group.id": f"interop-{topic}",
        "enable.auto.commit": False,
        "auto.offset.reset": "earliest",
    })
    partitions = consumer.list_topics(topic, timeout=PATIENCE).topics[topic].partitions
    consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
    found = []
    deadline = time.monotonic() + PATIENCE
    while len(found) < count and time.monotonic() < deadline:
        message = consumer.poll(1)
        if message is None:
            continue
        if message.error():
            raise SystemExit(str(message.error()))
        found.append({
            "partition": message.partition(),
            "offset": message.offset(),
            "key": to_hex(message.key()),
            "value": to_hex(message.value()),
            "headers": [[name, to_hex(value)] for name, value in message.headers() or []],
        })
    consumer.close()
    return found


def publish(servers, topic, messages):
    producer = Producer({"bootstrap.servers": servers, "partitioner": "murmur2_random"})
    places = [None] * len(messages)

    def answer(index):
        def answered(error, message):
            places[index] = {"error": str(error)} if error else {
                "partition": message.partition(),
                "offset": message.offset(),
            }
        return answered

    for index, message in enumerate(messages):
        headers = [(name, from_hex(value)) for name, value in message["headers"]]
        key, value = from_hex(message["key"]), from_hex(message["value"])
        if all(isinstance(name, str) for name, _ in headers):
            producer.produce(topic, key=key, value=value, headers=headers, on_delivery=answer(index))
        else:
            places[index] = publish_raw(servers, topic, key, value, headers)
    producer.flush(PATIENCE)
    return places


class Raw(str):
    """The name of a header that is no text; in JSON it is a list of its bytes."""

    def encode(self, *_):
        return bytes.fromhex(self)


def publish_raw(servers, topic, key, value, headers):
    """Publishes through a client that can be made to say what Python's other client refuses."""
    headers = [(name if isinstance(name, str) else Raw(name[0]), value) for name, value in headers]
    producer = KafkaProducer(bootstrap_servers=servers)
    place = producer.send(topic, value=value, key=key, headers=headers).get(timeout=PATIENCE)
    producer.close()
    return {"partition": place.partition, "offset": place.offset}


def to_hex(data):
    return None if data is None else data.hex()


def from_hex(text):
    return None if text is None else bytes.fromhex(text)


servers, command, topic, *rest = sys.argv[1:]
answer = read(servers, topic, int(rest[0])) if command == "read" else publish(servers, topic, json.load(sys.stdin))
json.dump(answer, sys.stdout)
