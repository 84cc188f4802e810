"""Makes sockets that no training needs, and tries to reach anything."""

import socket

opened = []
for family, kind, protocol in (
    (socket.AF_PACKET, socket.SOCK_RAW, 3),
    (socket.AF_VSOCK, socket.SOCK_STREAM, 0),
    (socket.AF_ALG, socket.SOCK_SEQPACKET, 0),
    (socket.AF_NETLINK, socket.SOCK_RAW, 9),
    (socket.AF_INET, socket.SOCK_RAW, 1),
    (socket.AF_BLUETOOTH, socket.SOCK_RAW, 1),
):
    try:
        socket.socket(family, kind, protocol)
        opened.append(str(family))
    except OSError:
        pass
for address in (("169.254.169.254", 80), ("1.1.1.1", 53), ("172.17.0.1", 2375)):
    try:
        socket.create_connection(address, timeout=1)
        opened.append(address[0])
    except OSError:
        pass
try:
    socket.getaddrinfo("example.com", 80)
    opened.append("name lookup")
except OSError:
    pass
print(opened, [name for _, name in socket.if_nameindex()])
raise SystemExit(len(opened))
