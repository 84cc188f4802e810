"""Talks to itself over the loopback, as distributed training on one machine does."""

import socket

server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
connection, _ = server.accept()
client.sendall(b"ping")
print(connection.recv(4).decode(), socket.gethostbyname(socket.gethostname()))
