# Makes the queues of the shop's Python programs as they are before an example: none for orders, and one
# for what the services publish, bound to the exchange of their topic.
import os
import sys
import pika

results, topic = sys.argv[1:]
connection = pika.BlockingConnection(pika.URLParameters(os.environ['RABBITMQ_URL']))
channel = connection.channel()

channel.queue_delete(queue='order_events')
channel.exchange_declare(exchange=topic, exchange_type='topic', durable=True)
channel.queue_declare(queue=results, durable=True)
channel.queue_purge(queue=results)
channel.queue_bind(queue=results, exchange=topic, routing_key='#')
connection.close()
