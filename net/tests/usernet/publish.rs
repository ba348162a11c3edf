//! Ports of the host's that lead into the guest, and neighbours.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use kiln_contract::{Protocol, PublishSpec};
use kiln_net::NetError;
use kiln_net::usernet::{GatewayOptions, Machine, NameTable, Published, Route};

use crate::world::{PATIENCE, World, address, ask, exchange, options, runtime, serve_echo, serve_sockets};

fn port(protocol: Protocol, container_port: u16) -> PublishSpec {
    PublishSpec { host_address: None, host_port: 0, host_port_last: None, container_port, protocol }
}

/// Publishes in a thread of its own, until the value that comes with the ports is dropped.
fn publish(world: &World, specs: &[PublishSpec]) -> (Vec<PublishSpec>, tokio::sync::oneshot::Sender<()>) {
    let mut published = Published::bind(specs).unwrap();
    let ports = published.ports().to_vec();
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let inward = world.inward.clone();
    std::thread::spawn(move || {
        runtime().block_on(async move {
            published.serve(&inward).unwrap();
            let _ = stopped.await;
        });
    });
    (ports, stop)
}

fn client(to: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.connect(to).unwrap();
    socket
}

#[test]
fn published_ports_lead_to_servers_on_loopback_or_on_the_guests_own_address() {
    let Some(world) = World::start(options(&[])) else { return };
    for at in ["127.0.0.1:80", "192.0.0.2:81", "[::1]:82", "0.0.0.0:83", "[fd6b:696c:6e00::2]:84"] {
        serve_echo(&world.guest, at);
    }
    let specs: Vec<_> = (80..85).flat_map(|p| [port(Protocol::Tcp, p), port(Protocol::Udp, p)]).collect();
    let (ports, stop) = publish(&world, &specs);
    let taken = PublishSpec { host_port: ports[0].host_port, ..ports[0].clone() };
    assert!(matches!(Published::bind(&[taken]), Err(NetError::PortTaken { .. })));
    for published in &ports {
        for host in ["127.0.0.1", "::1", "10.77.0.1"] {
            let to = SocketAddr::new(address(host), published.host_port);
            let answer = match published.protocol {
                Protocol::Tcp => exchange(&TcpStream::connect(to).unwrap(), b"hello").unwrap(),
                Protocol::Udp => ask(&client(to), b"hello").unwrap(),
            };
            assert_eq!(answer, b"hello", "{published:?} at {host}");
        }
    }
    // From outside.
    let to = SocketAddr::new(address("10.77.0.1"), ports[0].host_port);
    assert_eq!(exchange(&world.far.inside(|| TcpStream::connect(to).unwrap()), b"far").unwrap(), b"far");
    drop(stop);
    crate::lab::wait_for("the port to be free", || {
        TcpListener::bind(("127.0.0.1", ports[0].host_port)).is_ok()
    });
}

#[test]
fn nobody_listening_in_the_guest_is_a_reset_and_a_server_that_comes_later_is_found() {
    let Some(world) = World::start(options(&[])) else { return };
    let (ports, _stop) = publish(&world, &[port(Protocol::Tcp, 80), port(Protocol::Udp, 80)]);
    let at = |index: usize| SocketAddr::new(address("127.0.0.1"), ports[index].host_port);
    let mut stream = TcpStream::connect(at(0)).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let udp = client(at(1));
    udp.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert_eq!(ask(&udp, b"hello").unwrap_err().kind(), ErrorKind::WouldBlock);
    serve_echo(&world.guest, "127.0.0.1:80");
    udp.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(ask(&udp, b"hello").unwrap(), b"hello", "the same client");
    assert_eq!(exchange(&TcpStream::connect(at(0)).unwrap(), b"hello").unwrap(), b"hello");
}

#[test]
fn many_clients_are_told_apart_and_each_direction_ends_on_its_own() {
    let Some(world) = World::start(options(&[])) else { return };
    serve_echo(&world.guest, "127.0.0.1:80");
    let (ports, _stop) = publish(&world, &[port(Protocol::Tcp, 80), port(Protocol::Udp, 80)]);
    let udp: Vec<_> =
        (0..200u32).map(|_| client(SocketAddr::new(address("127.0.0.1"), ports[1].host_port))).collect();
    for (number, socket) in udp.iter().enumerate() {
        assert_eq!(ask(socket, &number.to_be_bytes()).unwrap(), number.to_be_bytes());
    }
    let mut tcp: Vec<_> = (0..200)
        .map(|_| TcpStream::connect(SocketAddr::new(address("127.0.0.1"), ports[0].host_port)).unwrap())
        .collect();
    for (number, stream) in tcp.iter_mut().enumerate() {
        stream.write_all(&number.to_be_bytes()).unwrap();
    }
    for (number, stream) in tcp.iter().enumerate() {
        assert_eq!(exchange(stream, b"!").unwrap(), [&number.to_be_bytes()[..], b"!"].concat());
    }
    let large = vec![7; 20 << 20];
    let stream = TcpStream::connect(SocketAddr::new(address("127.0.0.1"), ports[0].host_port)).unwrap();
    assert!(exchange(&stream, &large).unwrap() == large);
}

#[test]
fn a_neighbour_is_reached_by_its_name_over_its_own_link() {
    let table = Arc::new(NameTable::default());
    let Some(world) =
        World::start(GatewayOptions { names: table.clone(), ..options(&["192.0.2.1", "self"]) })
    else {
        return;
    };
    // The guest is its own neighbour, at an address of the network's.
    let own = address("10.99.0.5");
    table.insert(own, &["self"], Route::Machine(Machine::new(Arc::clone(&world.inward.borrow()))));
    let sockets = world
        .guest
        .inside(|| (TcpListener::bind("0.0.0.0:7000").unwrap(), UdpSocket::bind("0.0.0.0:7000").unwrap()));
    serve_sockets(sockets.0, sockets.1);
    assert_eq!(exchange(&world.connect("10.99.0.5:7000").unwrap(), b"hello").unwrap(), b"hello");
    assert_eq!(ask(&world.datagrams("10.99.0.5:7000"), b"hello").unwrap(), b"hello");
    assert_eq!(world.connect("10.99.0.5:9").unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(
        ask(&world.datagrams("10.99.0.5:9"), b"hello").unwrap_err().kind(),
        ErrorKind::ConnectionRefused
    );
}
