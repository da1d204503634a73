"""Attacks over the network.  No packet ever leaves the machine."""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import socket
import struct

from tests.attacks.probes.base import (
    Blocked,
    Context,
    addr,
    check,
    libc,
    probe,
    syscall,
)


def _greeting(family: int, kind: int, address: object) -> str:
    with socket.socket(family, kind) as client:
        client.settimeout(3)
        client.connect(address)  # type: ignore[arg-type]
        if kind == socket.SOCK_DGRAM:
            client.send(b"hello")
        return client.recv(16).decode()


@probe
def tcp4_loopback(context: Context) -> object:
    """GCS, raylet, dashboard: all of Ray listens here."""
    return _greeting(2, socket.SOCK_STREAM, ("127.0.0.1", context["tcp4_port"]))


@probe
def tcp6_loopback(context: Context) -> object:
    return _greeting(10, socket.SOCK_STREAM, ("::1", context["tcp6_port"]))


@probe
def udp4_loopback(context: Context) -> object:
    return _greeting(2, socket.SOCK_DGRAM, ("127.0.0.1", context["udp4_port"]))


@probe
def udp6_loopback(context: Context) -> object:
    return _greeting(10, socket.SOCK_DGRAM, ("::1", context["udp6_port"]))


@probe
def tcp4_on_own_address(context: Context) -> object:
    return _greeting(2, socket.SOCK_STREAM, (context["address"], context["tcp4_port"]))


@probe
def tcp_listen(context: Context) -> object:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        return server.getsockname()[1]


def _loopback_up() -> None:
    """Bring lo up through ioctl; works in a network namespace of one's own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH14x", b"lo", 1)
        fcntl.ioctl(sock, 0x8914, request)


@probe
def loopback_up(context: Context) -> object:
    _loopback_up()
    return "up"


@probe
def cloud_metadata(context: Context) -> object:
    """169.254.169.254 hands node credentials to whoever asks.

    Outside, the address is put on the loopback of a fresh network namespace
    and served there, so that nothing is ever sent to the real one.  In the
    jail, connect must fail before a packet could exist.
    """
    address = ("169.254.169.254", 80)
    if context["side"] != "control":
        with socket.socket() as client:
            client.settimeout(3)
            client.connect(address)
        return "connected"
    _loopback_up()
    with socket.socket() as server:
        host = socket.inet_aton(address[0])
        request = struct.pack("16sH2x4s8x", b"lo", socket.AF_INET, host)
        fcntl.ioctl(server, 0x8916, request)
        server.bind(address)
        server.listen()
        with socket.create_connection(address, timeout=3):
            return "connected"


@probe
def raw_socket(context: Context) -> object:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()
    return "raw"


@probe
def raw6_socket(context: Context) -> object:
    socket.socket(socket.AF_INET6, socket.SOCK_RAW, 58).close()
    return "raw"


@probe
def packet_socket(context: Context) -> object:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
    return "packet"


@probe
def netlink_route(context: Context) -> object:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()
    return "netlink"


@probe
def netlink_sock_diag(context: Context) -> object:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4).close()
    return "sock_diag"


@probe
def netlink_uevent(context: Context) -> object:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15).close()
    return "uevent"


@probe
def netlink_netfilter(context: Context) -> object:
    """nf_tables: the richest source of kernel exploits of these years."""
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12).close()
    return "netfilter"


@probe
def netlink_audit(context: Context) -> object:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 9).close()
    return "audit"


@probe
def vsock(context: Context) -> object:
    """AF_VSOCK reaches the hypervisor; no network namespace covers it."""
    socket.socket(40, socket.SOCK_STREAM).close()
    return "vsock"


@probe
def af_alg(context: Context) -> object:
    socket.socket(38, socket.SOCK_SEQPACKET).close()
    return "alg"


@probe
def af_xdp(context: Context) -> object:
    socket.socket(44, socket.SOCK_RAW).close()
    return "xdp"


@probe
def af_tipc(context: Context) -> object:
    socket.socket(30, socket.SOCK_RDM).close()
    return "tipc"


@probe
def af_bluetooth(context: Context) -> object:
    socket.socket(31, socket.SOCK_RAW, 1).close()
    return "bluetooth"


@probe
def af_can(context: Context) -> object:
    socket.socket(29, socket.SOCK_RAW, 1).close()
    return "can"


@probe
def mptcp_socket(context: Context) -> object:
    """Another protocol of an allowed-looking family passes port rules by."""
    socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).close()
    return "mptcp"


@probe
def sctp_socket(context: Context) -> object:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132).close()
    return "sctp"


@probe
def socketpair_inet(context: Context) -> object:
    """Outside EOPNOTSUPP is the kernel's own answer: the call was reached."""
    try:
        socket.socketpair(socket.AF_INET)
    except OSError as error:
        if error.errno == 95:
            return "reached"
        raise
    return "pair"


@probe
def socket_family_in_high_half(context: Context) -> object:
    """The kernel reads 32 bits of the family, a careless filter 64."""
    number = {"x86_64": 41, "aarch64": 198}[os.uname().machine]
    fd = int(
        libc.syscall(
            ctypes.c_long(number),
            ctypes.c_uint64(2 | 1 << 32),
            ctypes.c_uint64(1),
            ctypes.c_uint64(0),
        )
    )
    return check(fd)


@probe
def abstract_socket_of_host(context: Context) -> object:
    return _greeting(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + context["abstract"])


@probe
def abstract_datagram_to_host(context: Context) -> object:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        return client.sendto(b"x", "\0" + context["abstract_dgram"])


@probe
def pathname_socket_of_host(context: Context) -> object:
    return _greeting(socket.AF_UNIX, socket.SOCK_STREAM, context["unix_socket"])


@probe
def pathname_socket_in_readonly(context: Context) -> object:
    """A socket in a directory that the profile binds read-only.

    A read-only mount does not stop connect(2), and no namespace does: this is
    how a fully unshared bubblewrap reached the Docker socket.
    """
    path = context["readonly"] + "/socket"
    return _greeting(socket.AF_UNIX, socket.SOCK_STREAM, path)


@probe
def datagram_of_a_pair_to_socket_in_readonly(context: Context) -> object:
    """One end of a pair needs no connect(2) to send to whom it likes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        return ours.sendto(b"x", context["readonly"] + "/socket-datagram")


@probe
def descriptors_by_socket_in_readonly(context: Context) -> object:
    """SCM_RIGHTS: a helper outside hands in a descriptor of a host file."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(3)
        client.connect(context["readonly"] + "/socket-fds")
        _, ancillary, _, _ = client.recvmsg(1, socket.CMSG_SPACE(4))
    fds = array.array("i")
    fds.frombytes(ancillary[0][2][:4])
    return os.pread(fds[0], 16, 0).decode()


@probe
def descriptors_by_abstract_socket(context: Context) -> object:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(3)
        client.connect("\0" + context["abstract_fds"])
        _, ancillary, _, _ = client.recvmsg(1, socket.CMSG_SPACE(4))
    fds = array.array("i")
    fds.frombytes(ancillary[0][2][:4])
    return os.pread(fds[0], 16, 0).decode()


@probe
def io_uring_socket(context: Context) -> object:
    """IORING_OP_SOCKET and OP_CONNECT go around every seccomp rule."""
    parameters = ctypes.create_string_buffer(120)
    return syscall("io_uring_setup", 4, addr(parameters))


@probe
def interfaces_of_host(context: Context) -> object:
    with open("/proc/net/dev") as file:
        names = [line.split(":")[0].strip() for line in file.readlines()[2:]]
    if names == ["lo"] and context["side"] != "control":
        raise Blocked("only lo")
    return names


@probe
def connections_of_host(context: Context) -> object:
    """The listener's port in /proc/net/tcp tells what the node runs."""
    with open("/proc/net/tcp") as file:
        text = file.read()
    if f":{context['tcp4_port']:04X} " not in text:
        raise Blocked("not listed")
    return "listed"


@probe
def unix_sockets_of_host(context: Context) -> object:
    with open("/proc/net/unix") as file:
        text = file.read()
    if context["abstract"] not in text:
        raise Blocked("not listed")
    return "listed"


@probe
def bind_abstract_name(context: Context) -> object:
    """Squat a name that a host service will want; the names are per netns.

    Outside the name is taken, so EADDRINUSE shows that it is the same space.
    """
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.bind("\0" + context["abstract"])
        except OSError as error:
            if error.errno == 98:
                return "same name space"
            raise
    raise Blocked("own name space")
