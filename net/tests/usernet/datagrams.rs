//! UDP and echo requests of programs in the guest.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use crate::world::{FAR, FAR6, GATEWAY, GATEWAY6, PATIENCE, World, ask, options};

#[test]
fn datagrams_of_every_length_are_carried_both_ways() {
    let Some(world) = World::start(options(&["any"])) else { return };
    for far in [format!("{FAR}:7000"), format!("[{FAR6}]:7000")] {
        world.serve_far(&far);
        for length in [0, 1, 1472, 1473, 9000, 65_000] {
            let question: Vec<u8> = (0..length).map(|byte| byte as u8).collect();
            assert!(ask(&world.datagrams(&far), &question).unwrap() == question, "{far}: {length}");
        }
    }
    // The longest that IPv4 can say.
    let socket = world.datagrams(&format!("{FAR}:7000"));
    assert!(ask(&socket, &[7; 65_507]).unwrap() == [7; 65_507]);
}

#[test]
fn every_destination_sees_the_same_source_and_only_destinations_can_answer() {
    let Some(world) = World::start(options(&["any"])) else { return };
    let far: Vec<UdpSocket> = (7000..7003)
        .map(|port| {
            let socket = world.far.inside(|| UdpSocket::bind((FAR, port)).unwrap());
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        })
        .collect();
    let socket = world.guest.inside(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut sources = Vec::new();
    let mut buffer = [0; 100];
    for destination in &far[..2] {
        socket.send_to(b"hello", destination.local_addr().unwrap()).unwrap();
        let (length, source) = destination.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"hello");
        sources.push(source);
    }
    assert_eq!(sources[0], sources[1]);
    // One that was not spoken to, and one that was.
    far[2].send_to(b"stranger", sources[0]).unwrap();
    far[1].send_to(b"friend", sources[0]).unwrap();
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from), (b"friend".as_slice(), far[1].local_addr().unwrap()));
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert_eq!(socket.recv_from(&mut buffer).unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn a_program_is_told_that_its_datagram_cannot_be_delivered() {
    let Some(world) = World::start(options(&["10.77.0.0/16", "fd77::/16", "198.51.100.0/24"])) else {
        return;
    };
    for (to, kinds) in [
        (format!("{FAR}:9"), vec![ErrorKind::ConnectionRefused]),
        (format!("[{FAR6}]:9"), vec![ErrorKind::ConnectionRefused]),
        ("198.51.100.1:9".into(), vec![ErrorKind::NetworkUnreachable]),
        ("10.77.0.99:9".into(), vec![ErrorKind::HostUnreachable]),
        // Not allowed (the kernel has different words for it in the two families).
        ("192.0.2.1:9".into(), vec![ErrorKind::HostUnreachable]),
        ("[2001:db8::1]:9".into(), vec![ErrorKind::PermissionDenied]),
        (format!("{GATEWAY}:9"), vec![ErrorKind::HostUnreachable]),
    ] {
        let socket = world.datagrams(&to);
        // Without it, the kernel keeps to itself what may pass: that there is no route just now.
        if to.starts_with('[') {
            setsockopt(&socket, sockopt::Ipv6RecvErr, &true).unwrap();
        } else {
            setsockopt(&socket, sockopt::Ipv4RecvErr, &true).unwrap();
        }
        let error = ask(&socket, b"hello").expect_err(&to);
        assert!(kinds.contains(&error.kind()), "{to}: {error:?}");
    }
    assert_eq!(world.gateway.counters().denied_datagrams, 3);
}

#[test]
fn fragments_of_a_narrower_device_are_put_together() {
    let Some(world) = World::start(options(&["any"])) else { return };
    world.serve_far(&format!("{FAR}:7000"));
    world.guest.run("ip route add 10.77.0.2 via 192.0.0.1 dev kiln0 mtu lock 1500").unwrap();
    let socket = world.datagrams(&format!("{FAR}:7000"));
    let whatever = rustix::net::sockopt::Ipv4PathMtuDiscovery::DONT;
    rustix::net::sockopt::set_ip_mtu_discover(&socket, whatever).unwrap();
    let question: Vec<u8> = (0..40_000u32).map(|byte| (byte % 251) as u8).collect();
    assert_eq!(ask(&socket, &question).unwrap(), question);
}

fn ping(world: &World, program: &str, to: &str) -> bool {
    world.guest.run(&format!("busybox {program} -c 1 -W 3 {to}")).is_some()
}

#[test]
fn the_gateway_answers_pings_and_the_world_does_where_the_host_may_ask() {
    let Some(world) = World::start(options(&["10.77.0.0/24", "fd77::/64"])) else { return };
    assert!(ping(&world, "ping", GATEWAY));
    assert!(ping(&world, "ping6", GATEWAY6));

    let allow = |range: &str| std::fs::write("/proc/sys/net/ipv4/ping_group_range", range).unwrap();
    allow("1 0");
    assert!(!ping(&world, "ping", FAR), "the host has no socket for it");
    allow("0 0");
    assert!(ping(&world, "ping", FAR));
    assert!(ping(&world, "ping6", FAR6));
    assert!(ping(&world, "ping -s 10000", FAR), "long ones too");
    assert!(!ping(&world, "ping", "10.77.0.99"), "nobody is there");
    assert!(!ping(&world, "ping", "192.0.2.1"), "not allowed");
}

#[test]
fn a_guest_with_more_sources_than_it_may_have_keeps_the_latest() {
    let mut few = options(&["any"]);
    few.limits.flows = 8;
    let Some(world) = World::start(few) else { return };
    let far: SocketAddr = format!("{FAR}:7000").parse().unwrap();
    world.serve_far(&far.to_string());
    let sockets: Vec<_> = (0..12).map(|_| world.datagrams(&far.to_string())).collect();
    let answered = sockets
        .iter()
        .filter(|socket| {
            socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            ask(socket, b"hello").is_ok()
        })
        .count();
    assert_eq!(answered, 8, "the host holds eight");
    assert!(world.gateway.counters().over_limit >= 4, "{:?}", world.gateway.counters());
}
