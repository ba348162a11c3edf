//! One TCP connection: smoltcp's state of it, and a stream to the host.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{
    Checksum, Device, DeviceCapabilities, Medium, PacketMeta, RxToken, SegmentationCapabilities, TxToken,
};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr, IpListenEndpoint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::packet::{TCP_CHECKSUM, leave_checksum};
use super::tun::Tun;

/// The buffer of a connection for which nothing is left.
const SMALLEST_BUFFER: usize = 16 << 10;
/// A new connection gets at most this part of what is left for buffers.
const SHARE: usize = 16;
/// Reads or writes before others have their turn.
const ROUNDS: usize = 16;
/// A timer that is not needed is put this far away.
const NEVER: Duration = Duration::from_secs(3600);
/// As soon as a timer can.
const SOON: Duration = Duration::from_millis(1);

/// Memory for buffers, returned when dropped.
#[derive(Debug)]
pub(super) struct Buffers {
    left: Arc<AtomicUsize>,
    taken: usize,
    /// Bytes for each direction.
    pub(super) size: usize,
}

impl Buffers {
    /// Takes from what is `left`; a connection always gets something.
    pub(super) fn take(left: &Arc<AtomicUsize>, most: usize) -> Self {
        let size = (left.load(Ordering::Relaxed) / SHARE).min(most).max(SMALLEST_BUFFER);
        let mut taken = 0;
        // The smallest are given even when nothing is left; then there is nothing to return either.
        let _ = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            taken = left.min(2 * size);
            Some(left - taken)
        });
        Self { left: Arc::clone(left), taken, size }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        self.left.fetch_add(self.taken, Ordering::Relaxed);
    }
}

/// The time as smoltcp wants it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock(std::time::Instant);

impl Clock {
    pub(super) fn start() -> Self {
        Self(std::time::Instant::now())
    }

    fn now(self) -> Instant {
        Instant::from_micros(i64::try_from(self.0.elapsed().as_micros()).unwrap_or(i64::MAX))
    }
}

/// A connection with a program in the guest.
pub(super) struct Connection {
    machine: Mutex<Machine>,
}

struct Machine {
    tun: Arc<Tun>,
    clock: Clock,
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    /// Of the task that carries this connection.
    waker: Option<Waker>,
    /// Both ends have said their last. All that smoltcp still has to do is to forget everything after ten seconds, also
    /// what the host has not taken yet.
    resting: bool,
    _buffers: Buffers,
}

impl Connection {
    /// Answers a SYN that was sent to `remote`; `None` if it is none.
    pub(super) fn answer(
        tun: &Arc<Tun>,
        clock: Clock,
        buffers: Buffers,
        remote: SocketAddr,
        syn: &[u8],
    ) -> Option<Self> {
        let mut config = Config::new(HardwareAddress::Ip);
        // Sequence numbers begin where nobody else can guess; only programs of the guest could use it.
        config.random_seed = getrandom::u64().unwrap_or_else(|_| u64::from(remote.port()));
        let mut device = Wire { tun, incoming: None };
        let mut interface = Interface::new(config, &mut device, clock.now());
        let address = IpAddress::from(remote.ip());
        let prefix = if remote.is_ipv4() { 32 } else { 128 };
        interface.update_ip_addrs(|addresses| addresses.extend([IpCidr::new(address, prefix)]));

        let mut socket =
            Socket::new(SocketBuffer::new(vec![0; buffers.size]), SocketBuffer::new(vec![0; buffers.size]));
        socket.listen(IpListenEndpoint { addr: Some(address), port: remote.port() }).ok()?;
        // Each segment is as long as it can be, and costs nothing to send: nothing is gained by waiting.
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        let mut machine = Machine {
            tun: Arc::clone(tun),
            clock,
            interface,
            sockets,
            handle,
            waker: None,
            resting: false,
            _buffers: buffers,
        };
        machine.receive(syn);
        machine.send();
        (machine.socket().state() == State::SynReceived).then(|| Self { machine: Mutex::new(machine) })
    }

    fn lock(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a segment of this connection. What it leads to is done by the connection's own task.
    pub(super) fn receive(&self, packet: &[u8]) {
        let mut machine = self.lock();
        machine.receive(packet);
        if let Some(waker) = machine.waker.take() {
            waker.wake();
        }
    }

    /// Tells the program that the connection was reset.
    pub(super) fn reset(&self) {
        self.lock().reset();
    }

    /// Carries bytes between the program and `stream` until both directions have ended, or one end failed. A stream
    /// that is dropped without having been shut down was reset.
    pub(super) async fn carry<S: AsyncRead + AsyncWrite + Unpin>(&self, mut stream: S) {
        let mut ends = Ends::default();
        let mut timer = std::pin::pin!(tokio::time::sleep(NEVER));
        std::future::poll_fn(|cx| self.lock().poll(cx, Pin::new(&mut stream), &mut ends, timer.as_mut()))
            .await;
    }
}

/// Which directions have ended.
#[derive(Debug, Default)]
struct Ends {
    /// The program sends no more.
    program: bool,
    /// The host was told so.
    told: bool,
    /// The host sends no more.
    host: bool,
}

impl Machine {
    fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    fn receive(&mut self, packet: &[u8]) {
        let mut device = Wire { tun: &self.tun, incoming: Some(packet) };
        self.interface.poll_ingress_single(self.clock.now(), &mut device, &mut self.sockets);
    }

    /// Sends whatever is to be sent now.
    fn send(&mut self) {
        if self.resting {
            return;
        }
        let mut device = Wire { tun: &self.tun, incoming: None };
        let now = self.clock.now();
        while self.interface.poll_egress(now, &mut device, &mut self.sockets) != PollResult::None {}
        self.resting = self.socket().state() == State::TimeWait;
    }

    fn reset(&mut self) {
        self.resting = false;
        self.socket().abort();
        self.send();
    }

    fn poll<S: AsyncRead + AsyncWrite>(
        &mut self,
        cx: &mut Context<'_>,
        mut stream: Pin<&mut S>,
        ends: &mut Ends,
        mut timer: Pin<&mut Sleep>,
    ) -> Poll<()> {
        if !self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            self.waker = Some(cx.waker().clone());
        }
        loop {
            let carried = self
                .carry_to_host(cx, stream.as_mut(), ends)
                .and_then(|up| Ok(up | self.carry_to_program(cx, stream.as_mut(), ends)?));
            let more = match carried {
                Ok(more) => more,
                Err(error) => {
                    tracing::debug!(%error, "the stream of a connection ended early");
                    self.reset();
                    return Poll::Ready(());
                }
            };
            self.send();
            let socket = self.socket();
            match socket.state() {
                // What the program had sent before comes first. (An RST for a SYN-ACK leads back to LISTEN.)
                State::Closed | State::Listen if socket.recv_queue() == 0 && (ends.told || !ends.program) => {
                    return Poll::Ready(());
                }
                // The last FIN is answered. Were the answer lost, an RST would answer its repetition: harmless.
                State::TimeWait if ends.told => return Poll::Ready(()),
                _ => {}
            }
            if more {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let now = self.clock.now();
            let wait = match self.interface.poll_at(now, &self.sockets) {
                _ if self.resting => NEVER,
                Some(at) if at > now => Duration::from_micros((at - now).total_micros()),
                // It was sent just now whatever could be.
                Some(_) => SOON,
                None => NEVER,
            };
            let deadline = tokio::time::Instant::now() + wait;
            // Each packet moves the deadline a little; the timer is only moved where that matters.
            if deadline < timer.deadline() || timer.is_elapsed() {
                timer.as_mut().reset(deadline);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }

    /// Whether there may be more to do at once.
    fn carry_to_host<S: AsyncWrite>(
        &mut self,
        cx: &mut Context<'_>,
        mut stream: Pin<&mut S>,
        ends: &mut Ends,
    ) -> std::io::Result<bool> {
        for _ in 0..ROUNDS {
            let socket = self.socket();
            // Its FIN may be there long before the last of its bytes is taken.
            ends.program |= matches!(
                socket.state(),
                State::CloseWait | State::LastAck | State::Closing | State::TimeWait
            );
            if !socket.can_recv() {
                let done = if ends.told {
                    return Ok(false);
                } else if ends.program {
                    stream.poll_shutdown(cx)?
                } else {
                    let _ = stream.poll_flush(cx)?;
                    return Ok(false);
                };
                ends.told = done.is_ready();
                return Ok(false);
            }
            let written = socket.recv(|data| match stream.as_mut().poll_write(cx, data) {
                Poll::Ready(Ok(written)) => (written, Some(Ok(written))),
                Poll::Ready(Err(error)) => (0, Some(Err(error))),
                Poll::Pending => (0, None),
            });
            match written {
                Ok(None) | Err(_) => return Ok(false),
                Ok(Some(Ok(0))) => return Err(std::io::ErrorKind::WriteZero.into()),
                Ok(Some(written)) => drop(written?),
            }
        }
        Ok(true)
    }

    /// Whether there may be more to do at once.
    fn carry_to_program<S: AsyncRead>(
        &mut self,
        cx: &mut Context<'_>,
        mut stream: Pin<&mut S>,
        ends: &mut Ends,
    ) -> std::io::Result<bool> {
        for _ in 0..ROUNDS {
            let socket = self.socket();
            if ends.host || !socket.can_send() {
                return Ok(false);
            }
            // Read into the place from which it is sent.
            let read = socket.send(|room| {
                let mut room = ReadBuf::new(room);
                match stream.as_mut().poll_read(cx, &mut room) {
                    Poll::Ready(Ok(())) => (room.filled().len(), Some(Ok(room.filled().len()))),
                    Poll::Ready(Err(error)) => (0, Some(Err(error))),
                    Poll::Pending => (0, None),
                }
            });
            match read {
                Ok(None) | Err(_) => return Ok(false),
                Ok(Some(Ok(0))) => {
                    ends.host = true;
                    socket.close();
                }
                Ok(Some(read)) => drop(read?),
            }
            // The program gets it while the rest is still being read.
            self.send();
        }
        Ok(true)
    }
}

/// The TUN device as smoltcp's: gives it one packet, and takes any number.
struct Wire<'a> {
    tun: &'a Tun,
    incoming: Option<&'a [u8]>,
}

impl Device for Wire<'_> {
    type RxToken<'b>
        = Incoming<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Outgoing<'b>
    where
        Self: 'b;

    fn receive(&mut self, _: Instant) -> Option<(Incoming<'_>, Outgoing<'_>)> {
        let packet = self.incoming.take()?;
        Some((Incoming(packet), Outgoing { tun: self.tun, segment: None }))
    }

    fn transmit(&mut self, _: Instant) -> Option<Outgoing<'_>> {
        Some(Outgoing { tun: self.tun, segment: None })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut segmentation = SegmentationCapabilities::default();
        segmentation.tcpv4 = std::num::NonZeroUsize::new(65_535);
        segmentation.tcpv6 = segmentation.tcpv4;
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = usize::from(self.tun.config().mtu);
        // The kernel leaves them out, and so do we.
        capabilities.checksum.tcp = Checksum::None;
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.segmentation = segmentation;
        capabilities
    }
}

struct Incoming<'a>(&'a [u8]);

impl RxToken for Incoming<'_> {
    fn consume<T, F: FnOnce(&[u8]) -> T>(self, work: F) -> T {
        work(self.0)
    }
}

struct Outgoing<'a> {
    tun: &'a Tun,
    /// The payload of each segment, if the kernel is to cut the packet.
    segment: Option<u16>,
}

impl TxToken for Outgoing<'_> {
    fn consume<T, F: FnOnce(&mut [u8]) -> T>(self, length: usize, work: F) -> T {
        self.tun.send(length, |packet| {
            let result = work(packet);
            let mut undone = leave_checksum(packet, TCP_CHECKSUM);
            undone.segments = self.segment.zip(headers(packet));
            (result, undone)
        })
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment = meta.segmentation_offload_size.map(std::num::NonZeroU16::get);
    }
}

/// The length of a packet's headers of IP and TCP.
fn headers(packet: &[u8]) -> Option<u16> {
    let ip = if packet.first()? >> 4 == 4 { 20 } else { 40 };
    Some(ip + u16::from(packet.get(usize::from(ip) + 12)? >> 4) * 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_connections_share_what_there_is_for_buffers_and_give_it_back() {
        let left = Arc::new(AtomicUsize::new(64 << 20));
        let taken: Vec<_> = (0..4096).map(|_| Buffers::take(&left, 512 << 10)).collect();
        assert_eq!(taken[0].size, 512 << 10);
        assert_eq!(taken[4095].size, SMALLEST_BUFFER);
        assert!(taken.windows(2).all(|pair| pair[0].size >= pair[1].size));
        assert_eq!(left.load(Ordering::Relaxed), 0);
        drop(taken);
        assert_eq!(left.load(Ordering::Relaxed), 64 << 20);
    }
}
