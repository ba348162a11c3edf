//! `cargo xtask demo`: Kiln's main job from end to end, as root and then as an ordinary user, with real parts: images
//! made by `debootstrap` and `umoci`, pushed by `skopeo` to a real registry on loopback. Then [machines] and [views].

mod machines;
mod story;
mod views;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use kiln_fixtures::{OrdinaryUser, RegistryOptions, RegistryServer};

use story::Story;

use crate::kiln::{self, Kiln};
use crate::setup;
use crate::shell::{Outcome, capture};

/// Runs the whole demo; the first step that does not do what it says ends it.
pub(crate) fn run() -> Outcome {
    setup::for_tests()?;
    let program = kiln::build()?;
    let begun = Instant::now();
    let mut story = Story::default();
    let missing = |what: &str| format!("cannot make {what}: see the skips above");

    story.chapter("Images from elsewhere");
    let (busybox, debian) =
        story.step("build a root filesystem of busybox, and one of Debian (debootstrap)", || {
            let busybox = kiln_fixtures::busybox_rootfs().ok_or_else(|| missing("the busybox root"))?;
            let debian = kiln_fixtures::debian_rootfs().ok_or_else(|| missing("the Debian root"))?;
            let size = capture(Command::new("du").arg("-sh").arg(&debian))?;
            let shown = format!("Debian: {}", size.split_whitespace().next().unwrap_or_default());
            Ok(((busybox, debian), shown))
        })?;
    let layouts = story.step("make OCI images of them (umoci)", || {
        let busybox = kiln_fixtures::oci_layout(&busybox, "latest").ok_or_else(|| missing("an image"))?;
        let debian = kiln_fixtures::oci_layout(&debian, "latest").ok_or_else(|| missing("an image"))?;
        Ok(([("busybox", busybox), ("debian", debian)], String::new()))
    })?;
    let registry = RegistryServer::start(&RegistryOptions::default()).ok_or_else(|| missing("a registry"))?;
    story.step(&format!("push them to a registry at {} (skopeo)", registry.address()), || {
        for (name, layout) in &layouts {
            let source = format!("oci:{}:latest", layout.display());
            let target = format!("docker://{}/{name}:latest", registry.address());
            let options = ["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"];
            capture(Command::new("skopeo").args(options).args([source, target]))?;
        }
        Ok(((), String::new()))
    })?;

    if rustix::process::geteuid().is_root() {
        story.chapter("As root");
        main_job(&mut story, &program, None, &registry, "as-root")?;
    }
    let user = OrdinaryUser::get().ok_or_else(|| missing("an ordinary user"))?;
    story.chapter(&format!("Rootless, as the user {}", user.name));
    main_job(&mut story, &program, Some(&user), &registry, "rootless")?;

    story.chapter("Machines");
    machines::run(&mut story, &program, &registry)?;

    if rustix::process::geteuid().is_root() {
        story.chapter("Views, as root");
        views::run(&mut story, &program, None, &registry, "as-root")?;
    }
    story.chapter(&format!("Views, as the user {}", user.name));
    views::run(&mut story, &program, Some(&user), &registry, "rootless")?;

    println!("\nAll {} steps did what they say, in {:.1} s.", story.steps(), begun.elapsed().as_secs_f64());
    Ok(())
}

/// Pull, run, publish, exec, commit, push, pull into an empty store, clean up.
fn main_job(
    story: &mut Story,
    program: &Path,
    user: Option<&OrdinaryUser>,
    registry: &RegistryServer,
    label: &str,
) -> Outcome {
    let kiln = Kiln::new(program, user)?;
    let image = |name: &str| format!("{}/{name}:latest", registry.address());
    let (busybox, debian) = (image("busybox"), image("debian"));

    story.step("kiln image pull debian: verified, split into objects, ready to run", || {
        Ok(((), kiln.output(["image", "pull", "--quiet", &debian])?))
    })?;
    story
        .step("kiln image pull busybox", || Ok(((), kiln.output(["image", "pull", "--quiet", &busybox])?)))?;
    story.step("kiln run: a program of the Debian image, in isolation", || {
        let script = r#"print "perl $^V as uid $< of ", `hostname`, "sees ", scalar(grep /^\d+$/, map { s{.*/}{}r } glob "/proc/*"), " processes\n""#;
        let said = kiln.output(["run", "--rm", "--hostname", "kiln-demo", "--network", "none", &debian, "perl", "-e", script])?;
        expect(&said, "as uid 0 of kiln-demo")?;
        Ok(((), said))
    })?;
    story.step("kiln run again: the image is warm, its size does not matter", || {
        Ok(((), kiln.output(["run", "--rm", "--network", "none", &debian, "true"])?))
    })?;
    story.step("kiln run: the exit code is the command's own", || {
        let status =
            kiln.command(["run", "--rm", "--network", "none", &busybox, "sh", "-c", "exit 7"]).status();
        match status.ok().and_then(|status| status.code()) {
            Some(7) => Ok(((), "7".to_owned())),
            other => Err(format!("expected exit code 7, got {other:?}")),
        }
    })?;
    story.step("kiln run -d -p: a web server in the background, with a port published", || {
        let options = ["run", "--detach", "--name", "web", "--publish", "127.0.0.1::80", &busybox];
        let command = ["httpd", "-f", "-p", "80", "-h", "/var/www"];
        capture(&mut kiln.command(options.into_iter().chain(command)))?;
        Ok(((), kiln.output(["ps"])?))
    })?;
    let address = kiln.output(["port", "web", "80"])?;
    let address = address.lines().next().unwrap_or_default().trim().to_owned();
    story.step(&format!("fetch http://{address}/ from this host"), || {
        let page = fetch(&address)?;
        expect(&page, "hello from kiln")?;
        Ok(((), page))
    })?;
    story.step("kiln exec: change the page inside the running container", || {
        let change = "echo changed by kiln exec > /var/www/index.html";
        kiln.output(["exec", "web", "sh", "-c", change])?;
        let page = fetch(&address)?;
        expect(&page, "changed by kiln exec")?;
        Ok(((), page))
    })?;
    story.step("kiln diff: what the container changed", || {
        let changes = kiln.output(["diff", "web"])?;
        expect(&changes, "/var/www/index.html")?;
        Ok(((), changes))
    })?;
    let result = format!("{}/{label}/web:1", registry.address());
    story.step("kiln commit: the change becomes a layer", || {
        Ok(((), kiln.output(["commit", "web", &result])?))
    })?;
    story.step("kiln image push: only what the registry lacks", || {
        kiln.output(["image", "push", "--quiet", &result])?;
        Ok(((), expect_layers(&result, 2)?))
    })?;
    story.step("pull the result into an empty store, and run it", || {
        let elsewhere = Kiln::new(program, user)?;
        elsewhere.output(["image", "pull", "--quiet", &result])?;
        let page =
            elsewhere.output(["run", "--rm", "--network", "none", &result, "cat", "/var/www/index.html"])?;
        expect(&page, "changed by kiln exec")?;
        Ok(((), page))
    })?;
    story.step("clean up: nothing stays behind", || {
        kiln.output(["rm", "--force", "web"])?;
        for image in [&busybox, &debian, &result] {
            kiln.output(["image", "rm", image])?;
        }
        let freed = kiln.output(["system", "prune", "--all", "--force"])?;
        let left = kiln.output(["ps", "--all", "--quiet"])? + &kiln.output(["image", "ls", "--quiet"])?;
        expect_clean(&kiln, &left)?;
        Ok(((), freed))
    })
}

fn expect(text: &str, part: &str) -> Outcome {
    if text.contains(part) { Ok(()) } else { Err(format!("expected {part:?} in:\n{text}")) }
}

/// At least so many layers of an image, as `skopeo` sees it in its registry; says how many.
fn expect_layers(image: &str, least: usize) -> Outcome<String> {
    let image = format!("docker://{image}");
    let told = capture(Command::new("skopeo").args(["inspect", "--tls-verify=false", &image]))?;
    let told: serde_json::Value = serde_json::from_str(&told).map_err(|error| error.to_string())?;
    let layers = told["Layers"].as_array().map_or(0, Vec::len);
    let said = format!("skopeo sees {layers} layers");
    if layers < least { Err(said) } else { Ok(said) }
}

/// Nothing in `left`, which Kiln still lists; nothing that is mounted in its home; and a store that is sound.
fn expect_clean(kiln: &Kiln, left: &str) -> Outcome {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    if !left.is_empty() || mounts.contains(&*kiln.home().to_string_lossy()) {
        return Err(format!("left behind: {left}\n{mounts}"));
    }
    kiln.output(["system", "check"]).map(drop)
}

/// `GET /`, again and again until the server has opened its port (at most ten seconds).
fn fetch(address: &str) -> Outcome<String> {
    let patience = Instant::now() + Duration::from_secs(10);
    loop {
        match fetch_once(address) {
            Ok(page) if !page.is_empty() => return Ok(page),
            Err(error) if Instant::now() > patience => {
                return Err(format!("cannot fetch http://{address}/: {error}"));
            }
            Ok(_) if Instant::now() > patience => return Err(format!("http://{address}/ answers nothing")),
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn fetch_once(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.split_once("\r\n\r\n").map(|(_, page)| page.trim_end().to_owned()).unwrap_or_default())
}
