# The program of seed 001. Only where RabbitMQ is, and as whom, is read from the environment.
import json
import os
import pika

connection = pika.BlockingConnection(
    pika.URLParameters(os.environ['RABBITMQ_URL'])
)
channel = connection.channel()

channel.queue_declare(queue='order_events')

event = {
    "event_type": "OrderCreated",
    "order_id": 123,
    "amount": 250
}

channel.basic_publish(
    exchange='',
    routing_key='order_events',
    body=json.dumps(event)
)

print("Event published")
connection.close()
