# Reads so many messages of a queue, as the shop's Python programs do, and prints them.
import os
import sys
import pika

queue, count = sys.argv[1], int(sys.argv[2])
connection = pika.BlockingConnection(pika.URLParameters(os.environ['RABBITMQ_URL']))
channel = connection.channel()

for method, properties, body in channel.consume(queue, inactivity_timeout=30):
    if method is None:
        sys.exit("nothing more has come for 30 seconds")
    print(body.decode())
    channel.basic_ack(method.delivery_tag)
    count -= 1
    if count == 0:
        break
connection.close()
