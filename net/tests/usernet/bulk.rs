//! What must arrive whatever the segments look like and whoever ends first.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::time::Duration;

use crate::world::{FAR, FAR6, World, exchange, options};

#[test]
fn a_program_behind_a_narrower_device_is_served_as_well() {
    let Some(world) = World::start(options(&["any"])) else { return };
    // As it is for containers in the guest: their segments are short, and the kernel cuts and joins them.
    world.guest.run("ip route add 10.77.0.2 via 192.0.0.1 dev kiln0 mtu lock 1500").unwrap();
    world.guest.run("ip -6 route add fd77::2 via fd6b:696c:6e00::1 dev kiln0 mtu lock 1500").unwrap();
    let all: Vec<u8> =
        (0..20_000_000u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for far in [format!("{FAR}:7000"), format!("[{FAR6}]:7000")] {
        world.serve_far(&far);
        let before = packets(&world);
        assert!(exchange(&world.connect(&far).unwrap(), &all).unwrap() == all, "{far}");
        let packets = packets(&world) - before;
        assert!(packets < all.len() / 1460 / 2, "{packets} packets: the kernel was to cut them");
    }
}

/// How many packets the guest's device has given to its kernel.
fn packets(world: &World) -> usize {
    let text = world.guest.inside(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap());
    let line = text.lines().find_map(|line| line.trim().strip_prefix("kiln0:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn what_was_sent_arrives_although_both_ends_have_closed_before_it_was_read() {
    let Some(world) = World::start(options(&["any"])) else { return };
    // Little room outside of the guest, so that some of it waits in the guest's half.
    let little = "4096 65536 65536";
    std::fs::write("/proc/sys/net/ipv4/tcp_wmem", little).unwrap();
    world.far.inside(|| std::fs::write("/proc/sys/net/ipv4/tcp_rmem", little).unwrap());
    let at: SocketAddr = format!("{FAR}:7000").parse().unwrap();
    let listener = world.far.inside(|| TcpListener::bind(at).unwrap());
    let (soon, late) = (Duration::from_millis(200), Duration::from_secs(11));
    for (server_ends_first, amount, read) in
        [(false, 500_000, soon), (false, 2_000_000, soon), (true, 2_000_000, soon), (true, 500_000, late)]
    {
        let mut client = world.connect(&at.to_string()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        if server_ends_first {
            server.shutdown(Shutdown::Write).unwrap();
        }
        let all = vec![7; amount];
        client.write_all(&all).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        server.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client.read(&mut [0; 10]).unwrap(), 0);
        drop(client);
        std::thread::sleep(read);
        let mut received = Vec::new();
        server.read_to_end(&mut received).unwrap();
        assert!(received == all, "{} of {amount} bytes", received.len());
    }
}
