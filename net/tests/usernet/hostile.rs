//! Ends that do not keep to the protocols. Nothing here needs privileges.

use std::sync::Arc;
use std::time::Duration;

use kiln_net::Policy;
use kiln_net::usernet::{Gateway, GatewayLimits, GatewayOptions, Upstreams};
use kiln_usernet::datagram::{Frame, Frames};
use kiln_usernet::guest::{self, TunConfig};
use kiln_usernet::{RESOLVER, Target, socks};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use crate::world::runtime;

fn gateway(connections: usize) -> Arc<Gateway> {
    Arc::new(Gateway::new(GatewayOptions {
        // Nothing leaves this process, whatever garbage happens to mean.
        policy: Policy::none(),
        upstreams: Upstreams::Nobody,
        limits: GatewayLimits { connections, flows: 4, queries: 4 },
        ..GatewayOptions::default()
    }))
}

/// Writes `bytes`, reads what comes, and expects the other end to end soon.
async fn feed(bytes: &[u8], serve: impl AsyncFnOnce(DuplexStream)) -> Vec<u8> {
    let (near, far) = duplex(1 << 16);
    let (mut reader, mut writer) = tokio::io::split(near);
    let feeding = async {
        let _ = writer.write_all(bytes).await;
        let _ = writer.shutdown().await;
        let mut answer = Vec::new();
        let _ = reader.read_to_end(&mut answer).await;
        answer
    };
    let both = async { tokio::join!(feeding, serve(far)).0 };
    tokio::time::timeout(Duration::from_secs(5), both).await.expect("an end that hangs")
}

/// A valid beginning and then anything.
fn beginnings() -> Vec<Vec<u8>> {
    vec![
        Vec::new(),
        b"\x05\x01\x00".to_vec(),
        b"\x05\x01\x00\x05\x01\x00\x03\x11dns.kiln.internal\x00\x35".to_vec(),
        b"\x05\x01\x00\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x01".to_vec(),
        b"\x00\x40\x01\x03\x11dns.kiln.internal\x00\x35".to_vec(),
        b"\x00\x20\x01\x01\x7f\x00\x00\x01\x00\x01".to_vec(),
        b"\x00\x20\x02\x04".to_vec(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn either_half_survives_anything(beginning in prop::sample::select(beginnings()), rest in prop::collection::vec(any::<u8>(), 0..3000)) {
        let bytes = [beginning, rest].concat();
        runtime().block_on(async {
            let gateway = gateway(4);
            let config = TunConfig::default();
            feed(&bytes, async |stream| gateway.serve_tcp(stream).await).await;
            feed(&bytes, async |stream| gateway.serve_udp(stream).await).await;
            feed(&bytes, async |stream| guest::serve_tcp(stream, &config).await).await;
            feed(&bytes, async |stream| guest::serve_udp(stream, &config).await).await;
        });
    }
}

#[test]
fn the_host_cannot_have_the_guest_connect_elsewhere() {
    runtime().block_on(async {
        for target in ["192.0.2.1:80", "example.org:80", "169.254.169.254:80"] {
            let (mut near, far) = duplex(1000);
            let target: Target = target.parse().unwrap();
            let config = TunConfig::default();
            let (told, ()) = tokio::join!(socks::connect(&mut near, &target), guest::serve_tcp(far, &config));
            assert_eq!(told.unwrap_err().reply(), Some(socks::Reply::NotAllowed), "{target}");
        }
    });
}

#[test]
fn a_guest_that_opens_streams_without_end_is_told_that_it_has_enough() {
    runtime().block_on(async {
        let gateway = gateway(3);
        let mut open = Vec::new();
        for _ in 0..3 {
            let (near, far) = duplex(1000);
            let serving = Arc::clone(&gateway);
            tokio::spawn(async move { serving.serve_tcp(far).await });
            open.push(near);
        }
        tokio::task::yield_now().await;
        let one_more = async || {
            let (mut near, far) = duplex(1000);
            let target: Target = format!("{RESOLVER}:53").parse().unwrap();
            let asking = async {
                let told = socks::connect(&mut near, &target).await;
                let _ = near.shutdown().await;
                told
            };
            tokio::join!(asking, gateway.serve_tcp(far)).0
        };
        assert_eq!(one_more().await.unwrap_err().reply(), Some(socks::Reply::Failed));
        assert_eq!(gateway.counters().over_limit, 1);
        drop(open);
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        one_more().await.unwrap();
    });
}

#[test]
fn queries_and_datagrams_that_come_faster_than_they_are_answered_are_lost_and_nothing_grows() {
    runtime().block_on(async {
        let gateway = gateway(3);
        let (near, far) = duplex(1 << 16);
        let serving = Arc::clone(&gateway);
        tokio::spawn(async move { serving.serve_udp(far).await });
        let mut frames = Frames::new(near);
        // Nobody reads the answers.
        let mut sent = 0;
        let name: Target = format!("{RESOLVER}:53").parse().unwrap();
        for _ in 0..20_000 {
            let refused = Frame::datagram("192.0.2.1:9".parse::<Target>().unwrap(), vec![0; 1000]);
            sent += usize::from(frames.push(&Frame::datagram(name.clone(), vec![0; 1000])));
            sent += usize::from(frames.push(&refused));
            let _ = tokio::time::timeout(Duration::ZERO, std::future::pending::<()>()).await;
        }
        assert!(sent > 100, "{sent}");
        assert!(sent < 40_000, "the queue has an end");
        let answer = tokio::time::timeout(Duration::from_secs(5), frames.next()).await;
        answer.expect("it is still served").unwrap().unwrap();
    });
}
