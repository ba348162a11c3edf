//! A guest that is none: it listens on a vsock port behind the device's socket, and speaks the link.

use std::io;
use std::os::unix::net::UnixListener as Blocking;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kiln_link::message::{self, Answer, Hello, Request, Stats};
use kiln_link::{GuestLink, Session, VERSION, frame, service};
use tokio::io::{
    AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, DuplexStream, duplex,
};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

/// Where the guest listens.
const PORT: u32 = 1024;
/// How long it takes until it does.
const BOOT: Duration = Duration::from_millis(60);
/// How long a connection is kept that the guest does not answer, because its driver is not there yet.
const UNANSWERED: Duration = Duration::from_secs(2);
/// Sends back what comes: a service of this guest only.
const ECHO: u16 = 99;

#[derive(Debug)]
pub(super) struct Guest {
    life: Arc<AtomicU32>,
    paused: watch::Sender<bool>,
    /// How often its connections were reset.
    resets: watch::Sender<u32>,
}

impl Guest {
    /// A guest that boots.
    pub(super) fn boot(socket: &Path) -> io::Result<Self> {
        Self::start(socket, 0, false)
    }

    /// A guest that was saved in its life number `life`, while it was parked.
    pub(super) fn restore(socket: &Path, life: u32) -> io::Result<Self> {
        Self::start(socket, life, true)
    }

    fn start(socket: &Path, life: u32, is_parked: bool) -> io::Result<Self> {
        // One that is there already is an error, as it is for Firecracker.
        let listener = Blocking::bind(socket)?;
        listener.set_nonblocking(true)?;
        let (paused, resets) = (watch::Sender::new(false), watch::Sender::new(0));
        let guest = Self { life: Arc::new(AtomicU32::new(life)), paused, resets };
        let (pausing, reset) = (guest.paused.subscribe(), guest.resets.subscribe());
        let life = Arc::clone(&guest.life);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (inside, port) = duplex(1 << 16);
                tokio::spawn(live(inside, life));
                device(listener, port, is_parked, pausing, reset).await;
            });
        });
        Ok(guest)
    }

    pub(super) fn life(&self) -> u32 {
        self.life.load(Ordering::SeqCst)
    }

    pub(super) fn pause(&self, paused: bool) {
        self.paused.send_replace(paused);
    }

    pub(super) fn reset(&self) {
        self.resets.send_modify(|resets| *resets += 1);
    }
}

/// The device: one connection after the other reaches the guest.
async fn device(
    listener: Blocking,
    mut port: DuplexStream,
    is_parked: bool,
    mut paused: watch::Receiver<bool>,
    mut resets: watch::Receiver<u32>,
) {
    let listener = UnixListener::from_std(listener).unwrap();
    if is_parked {
        // It has said hello in the life before; nobody hears it a second time.
        frame::read(&mut port).await.unwrap().unwrap();
    } else {
        tokio::time::sleep(BOOT).await;
    }
    loop {
        let stream = listener.accept().await.unwrap().0;
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        let heard = tokio::time::timeout(UNANSWERED, (&mut reader).take(64).read_line(&mut line)).await;
        if !matches!(heard, Ok(Ok(1..))) || line != format!("CONNECT {PORT}\n") {
            // Nobody listens there.
            continue;
        }
        paused.wait_for(|paused| !paused).await.unwrap();
        resets.mark_unchanged();
        if reader.get_mut().write_all(b"OK 1073741824\n").await.is_ok() {
            carry(reader, &mut port, &mut paused, &mut resets).await;
        }
    }
}

async fn carry(
    host: BufReader<UnixStream>,
    port: &mut DuplexStream,
    paused: &mut watch::Receiver<bool>,
    resets: &mut watch::Receiver<u32>,
) {
    let (mut from_host, mut to_host) = tokio::io::split(host);
    let (mut down, mut up) = (vec![0; 4096], vec![0; 4096]);
    loop {
        // What is paused takes nothing and gives nothing.
        paused.wait_for(|paused| !paused).await.unwrap();
        let is_reset = resets.has_changed().unwrap();
        tokio::select! {
            count = from_host.read(&mut down) => match count {
                // The guest's end is no more: what came is lost, and the host's end hears of it now.
                Ok(1..) if is_reset => return,
                Ok(count @ 1..) => port.write_all(&down[..count]).await.unwrap(),
                _ => return,
            },
            count = port.read(&mut up), if !is_reset => {
                if to_host.write_all(&up[..count.unwrap()]).await.is_err() {
                    return;
                }
            }
            _ = paused.changed() => {}
            _ = resets.changed(), if !is_reset => {
                // Not seen yet, for the next turn.
                resets.mark_changed();
            }
        }
    }
}

async fn live(inside: DuplexStream, life: Arc<AtomicU32>) {
    let hello = Hello { version: VERSION, kernel: "6.1.0-none".to_owned(), uptime: 60 };
    let mut link = GuestLink::new(inside, hello);
    while let Ok(session) = link.next_session().await {
        let life = life.fetch_add(1, Ordering::SeqCst) + 1;
        tokio::spawn(serve(session, life));
    }
}

async fn serve(mut session: Session, life: u32) {
    while let Some((number, mut stream)) = session.accept().await {
        tokio::spawn(async move {
            match number {
                service::CONTROL => {
                    if let Ok(Some(Request::Stats)) = message::receive(&mut stream).await {
                        let stats = Stats { tasks: life.into(), ..Stats::default() };
                        let _ = message::send(&mut stream, &Answer::Stats(stats)).await;
                        let _ = stream.shutdown().await;
                    }
                }
                ECHO => {
                    let (mut reader, mut writer) = tokio::io::split(stream);
                    let _ = tokio::io::copy(&mut reader, &mut writer).await;
                    let _ = writer.shutdown().await;
                }
                _ => {}
            }
        });
    }
}
