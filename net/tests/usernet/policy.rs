//! What a guest can reach, by whatever way.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

use hickory_proto::rr::RecordType;
use kiln_net::usernet::{Gateway, GatewayOptions};
use kiln_usernet::datagram::{Content, Frame, Frames, Unreachable};
use kiln_usernet::socks::{self, Reply};
use kiln_usernet::{Open, TCP, Target, UDP};

use crate::names::{NameServer, data, query, with_server};
use crate::world::{
    FAR, FAR6, GATEWAY, GATEWAY6, HOST, World, ask, exchange, options, runtime, serve_sockets,
};

/// A server on all addresses of the host.
fn serve_host(port: u16) {
    let at = SocketAddr::from(([0, 0, 0, 0], port));
    serve_sockets(TcpListener::bind(at).unwrap(), UdpSocket::bind(at).unwrap());
}

/// What a guest is told that asks the host's half itself, as a hostile one would.
fn ask_directly(world: &World, target: &str) -> Result<(), Reply> {
    let target: Target = target.parse().unwrap();
    runtime().block_on(async {
        let mut stream = world.link.open(TCP).await.unwrap();
        socks::connect(&mut stream, &target).await.map_err(|error| error.reply().unwrap())
    })
}

/// The same of a datagram.
fn send_directly(world: &World, target: &str) -> Option<Content> {
    let frame = Frame::datagram(target.parse::<Target>().unwrap(), b"hello");
    runtime().block_on(async {
        let mut frames = Frames::new(world.link.open(UDP).await.unwrap());
        frames.push(&frame);
        let answer = tokio::time::timeout(Duration::from_millis(500), frames.next()).await;
        answer.ok().and_then(|answer| answer.unwrap()).map(|frame| frame.content)
    })
}

#[test]
fn the_host_itself_is_closed_in_every_form_that_leads_there() {
    let Some(world) = World::start(options(&["any", "0.0.0.0/0", "[::/0]:1-65535"])) else { return };
    serve_host(7000);
    assert!(
        std::net::TcpStream::connect("127.0.0.1:7000").is_ok()
            && std::net::TcpStream::connect("0.0.0.0:7000").is_ok()
    );
    let ways = [
        "127.0.0.1:7000",
        "127.9.9.9:7000",
        "0.0.0.0:7000",
        "[::ffff:127.0.0.1]:7000",
        "[::ffff:0.0.0.0]:7000",
        "[::1]:7000",
        "[::]:7000",
        "10.77.0.1:7000",
        "[::ffff:10.77.0.1]:7000",
        "[fd77::1]:7000",
        "192.0.0.1:7000",
        "[fd6b:696c:6e00::1]:7000",
        "host.kiln.internal:7000",
        "localhost:7000",
    ];
    for way in ways {
        assert_eq!(ask_directly(&world, way), Err(Reply::NotAllowed), "{way}");
    }
    for way in &ways[..ways.len() - 2] {
        let told = send_directly(&world, way);
        assert_eq!(told, Some(Content::Unreachable(Unreachable::Prohibited)), "{way}");
    }
    assert_eq!(send_directly(&world, "localhost:7000"), None);
    let counters = world.gateway.counters();
    assert_eq!((counters.denied_connections, counters.denied_datagrams), (14, 12));
    // And for a program: at once, and as a refusal.
    for to in [format!("{GATEWAY}:7000"), format!("[{GATEWAY6}]:7000"), format!("{HOST}:7000")] {
        assert_eq!(world.connect(&to).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{to}");
    }
}

#[test]
fn an_address_of_the_hosts_own_is_open_to_a_guest_that_was_given_it_in_full() {
    let Some(world) = World::start(options(&["10.77.0.0/24", "10.77.0.1:7000"])) else { return };
    serve_host(7000);
    serve_host(7001);
    let stream = world.connect(&format!("{HOST}:7000")).unwrap();
    assert_eq!(exchange(&stream, b"to the host").unwrap(), b"to the host");
    assert_eq!(world.connect(&format!("{HOST}:7001")).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(world.gateway.counters().denied_connections, 1);
}

#[test]
fn the_hosts_loopback_is_open_to_a_guest_that_was_given_it_at_the_ports_it_was_given() {
    let Some(world) = World::start(options(&["host-loopback:7000", "host-loopback:7002"])) else { return };
    let at = SocketAddr::from(([127, 0, 0, 1], 7000));
    serve_sockets(TcpListener::bind(at).unwrap(), UdpSocket::bind(at).unwrap());
    serve_host(7001);
    let at6: SocketAddr = "[::1]:7002".parse().unwrap();
    serve_sockets(TcpListener::bind(at6).unwrap(), UdpSocket::bind(at6).unwrap());
    for gateway in [GATEWAY.to_owned(), format!("[{GATEWAY6}]")] {
        let stream = world.connect(&format!("{gateway}:7000")).unwrap();
        assert_eq!(exchange(&stream, b"to the host").unwrap(), b"to the host");
        assert_eq!(ask(&world.datagrams(&format!("{gateway}:7000")), b"datagram").unwrap(), b"datagram");
        assert_eq!(
            world.connect(&format!("{gateway}:7001")).unwrap_err().kind(),
            ErrorKind::ConnectionRefused
        );
        let stream = world.connect(&format!("{gateway}:7002")).unwrap();
        assert_eq!(exchange(&stream, b"a server on ::1 alone").unwrap(), b"a server on ::1 alone");
    }
    assert_eq!(ask_directly(&world, "host.kiln.internal:7000"), Ok(()));
    assert_eq!(data(&query(&world, "host.kiln.internal", RecordType::A)), [GATEWAY]);
    assert_eq!(world.connect(&format!("{FAR}:7000")).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_name_opens_what_it_leads_to_and_nothing_that_is_closed() {
    let rules = ["good.test:7000", "*.wild.test", "rebind.test", "alias.test"];
    let Some(world) = World::start(with_server(&rules)) else { return };
    serve_host(7000);
    world.serve_far(&format!("{FAR}:7000"));
    world.serve_far(&format!("{FAR}:7001"));
    world.serve_far(&format!("[{FAR6}]:7000"));
    NameServer::start(
        &world,
        &[
            ("good.test", FAR, 1),
            ("a.wild.test", FAR6, 1),
            ("alias.test", "target.elsewhere.test", 60),
            ("target.elsewhere.test", "10.77.0.99", 60),
            ("stray.elsewhere.test", "10.77.0.98", 60),
            ("rebind.test", "127.0.0.1", 60),
            ("rebind.test", "169.254.169.254", 60),
            ("rebind.test", HOST, 60),
            ("rebind.test", GATEWAY, 60),
            ("rebind.test", "::ffff:127.0.0.1", 60),
        ],
    );
    let refused = |to: &str| {
        world.connect(to).map(drop).map_err(|error| error.kind()) == Err(ErrorKind::ConnectionRefused)
    };
    let (far, far6) = (format!("{FAR}:7000"), format!("[{FAR6}]:7000"));

    assert!(refused(&far), "nobody has asked for the name yet");
    assert_eq!(data(&query(&world, "good.test", RecordType::A)), [FAR]);
    assert_eq!(exchange(&world.connect(&far).unwrap(), b"x").unwrap(), b"x");
    assert_eq!(ask(&world.datagrams(&far), b"x").unwrap(), b"x");
    assert!(refused(&format!("{FAR}:7001")), "another port");
    assert!(refused(&far6), "another address");
    query(&world, "a.wild.test", RecordType::AAAA);
    assert_eq!(exchange(&world.connect(&far6).unwrap(), b"x").unwrap(), b"x");

    // Through an alias; what it leads to is open, and only that.
    assert_eq!(data(&query(&world, "alias.test", RecordType::A)), ["target.elsewhere.test.", "10.77.0.99"]);
    assert_eq!(ask_directly(&world, "10.77.0.99:7000"), Err(Reply::HostUnreachable));
    assert_eq!(ask_directly(&world, "10.77.0.98:7000"), Err(Reply::NotAllowed));

    // The owner of an allowed name points it at the host.
    assert_eq!(data(&query(&world, "rebind.test", RecordType::A)).len(), 4);
    query(&world, "rebind.test", RecordType::AAAA);
    for closed in ["127.0.0.1", "169.254.169.254", HOST, GATEWAY, "[::ffff:127.0.0.1]"] {
        assert_eq!(ask_directly(&world, &format!("{closed}:7000")), Err(Reply::NotAllowed), "{closed}");
    }

    // Another guest has not asked.
    let other = Gateway::new(with_server(&rules));
    let (mut near, stream) = tokio::io::duplex(1000);
    let told = runtime().block_on(async {
        let target: Target = far.parse().unwrap();
        let (told, ()) = tokio::join!(socks::connect(&mut near, &target), other.serve_tcp(stream));
        told.unwrap_err().reply()
    });
    assert_eq!(told, Some(Reply::NotAllowed));
}

#[test]
fn a_guest_with_no_rules_reaches_nothing_and_nobody() {
    let table = std::sync::Arc::new(kiln_net::usernet::NameTable::default());
    let far = crate::world::address(FAR);
    table.insert(far, &["web"], kiln_net::usernet::Route::Address(far));
    let Some(world) = World::start(GatewayOptions { names: table, ..with_server(&[]) }) else { return };
    world.serve_far(&format!("{FAR}:7000"));
    for target in ["10.77.0.2:7000", "web:7000", "web.kiln.internal:7000", "192.0.0.1:7000", "example.org:80"]
    {
        assert_eq!(ask_directly(&world, target), Err(Reply::NotAllowed), "{target}");
    }
    for name in ["web", "host.kiln.internal", "example.org"] {
        assert!(data(&query(&world, name, RecordType::A)).is_empty(), "{name}");
    }
}
