//! The third act: the software of a studio as five layers, seen by who needs it, edited, committed, rolled back, pushed,
//! there again from an empty store, and two versions of it at once.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Stdio;

use kiln_fixtures::{OrdinaryUser, RegistryServer};

use super::story::Story;
use super::{expect, expect_clean, expect_layers};
use crate::kiln::Kiln;
use crate::shell::Outcome;

/// What each team makes: its layer's name, and its files.
const LAYERS: [(&str, &[(&str, &str)]); 4] = [
    (
        "renderer",
        &[(
            "opt/renderer/bin/render",
            "#!/kiln/bin/sh\n. /kiln/etc/studio/colour\nfor plugin in /kiln/opt/renderer/plugins/*; do . $plugin; done\necho \"$SHOW: $1 in $COLOUR with$PLUGINS\"\n",
        )],
    ),
    (
        "plugins",
        &[
            ("opt/renderer/plugins/cloth", "PLUGINS=\"$PLUGINS cloth\"\n"),
            ("opt/renderer/plugins/hair", "PLUGINS=\"$PLUGINS hair\"\n"),
        ],
    ),
    ("colour", &[("etc/studio/colour", "COLOUR=linear\n. /kiln/etc/studio/show\n")]),
    ("show", &[("etc/studio/show", "SHOW=pilot\n")]),
];

/// What is seen of them.
const STACK: &str = "studio/platform+studio/renderer+studio/plugins+studio/colour+studio/show";
const RENDER: &str = "/kiln/opt/renderer/bin/render";

pub(super) fn run(
    story: &mut Story,
    program: &Path,
    user: Option<&OrdinaryUser>,
    registry: &RegistryServer,
    label: &str,
) -> Outcome {
    let kiln = Kiln::new(program, user)?;
    let environment = format!("{}/{label}/studio:1", registry.address());
    make_layers(story, &kiln, registry)?;
    story.step("kiln fs run A+B+C+D+E: one command sees the five as one, and nobody else does", || {
        let said = kiln.output(["fs", "run", STACK, "--", RENDER, "shot 1"])?;
        expect(&said, "pilot: shot 1 in linear with cloth hair")?;
        if Path::new(RENDER).exists() { Err(format!("{RENDER} is here too")) } else { Ok(((), said)) }
    })?;
    story.step(
        "kiln fs commit: the environment gets a name; an edit of it becomes a version of that",
        || {
            let commit = |reference: &str, change: &str, message: &str| {
                let script = format!(
                    "{change}; {} fs commit -t {environment} -m '{message}'",
                    kiln.program().display()
                );
                kiln.output(["fs", "run", reference, "--edit", "--", "sh", "-ec", &script])
            };
            commit(STACK, "true", "as it was delivered")?;
            commit(
                &environment,
                "rm /kiln/opt/renderer/plugins/hair; echo COLOUR=wide >> /kiln/etc/studio/colour",
                "wide",
            )?;
            Ok(((), kiln.output(["fs", "diff", &format!("{environment}~1"), &environment])?))
        },
    )?;
    story.step("the new version, and with ~1 the one before", || {
        let new = kiln.output(["fs", "run", &environment, "--", RENDER, "shot 2"])?;
        let old = kiln.output(["fs", "run", &format!("{environment}~1"), "--", RENDER, "shot 2"])?;
        expect(&new, "pilot: shot 2 in wide with cloth")?;
        expect(&old, "pilot: shot 2 in linear with cloth hair")?;
        Ok(((), format!("{new}\n{old}")))
    })?;
    story.step("roll back: the name points to the one before again", || {
        kiln.output(["fs", "tag", &format!("{environment}~1"), &environment])?;
        expect(&kiln.output(["fs", "run", &environment, "--", RENDER, "shot 3"])?, "in linear")?;
        // And forward once more: nothing is lost by it.
        kiln.output(["fs", "tag", &format!("{environment}~1"), &environment])?;
        let said = kiln.output(["fs", "run", &environment, "--", RENDER, "shot 3"])?;
        expect(&said, "in wide")?;
        Ok(((), kiln.output(["fs", "log", &environment])?))
    })?;
    story.step("kiln fs push: an environment is an image that any registry holds", || {
        kiln.output(["fs", "push", "--quiet", "--compression", "zstd:chunked", &environment])?;
        Ok(((), expect_layers(&environment, 7)?))
    })?;
    story.step(
        "the same from an empty store on demand: it runs, and what it did not open has not come",
        || {
            let elsewhere = Kiln::new(program, user)?;
            let said =
                elsewhere.output(["fs", "run", "--pull", "lazy", &environment, "--", RENDER, "shot 4"])?;
            expect(&said, "pilot: shot 4 in wide with cloth")?;
            let here = elsewhere.output(["image", "ls"])?;
            expect(&here, "partly here")?;
            elsewhere.output(["fs", "pull", "--quiet", &environment])?;
            let whole = elsewhere.output(["fs", "run", &environment, "--", RENDER, "shot 5"])?;
            expect(&whole, "pilot: shot 5 in wide with cloth")?;
            Ok(((), format!("{said}\n{here}\n{whole}")))
        },
    )?;
    two_at_once(story, &kiln, user, &environment)?;
    story.step("clean up: nothing stays behind", || {
        kiln.output(["fs", "runtimes", "prune"])?;
        let left = kiln.output(["fs", "runtimes", "ls", "-q"])?;
        expect_clean(&kiln, &left)?;
        Ok(((), String::new()))
    })
}

/// A platform from the registry, and four layers from directories.
fn make_layers(story: &mut Story, kiln: &Kiln, registry: &RegistryServer) -> Outcome {
    story.step("five layers: a platform from the registry, four from what teams have in directories", || {
        let platform = format!("{}/busybox:latest", registry.address());
        kiln.output(["fs", "pull", "--quiet", &platform])?;
        kiln.output(["fs", "tag", &platform, "studio/platform"])?;
        let failed = |error: std::io::Error| format!("cannot make a layer's files: {error}");
        for (name, files) in LAYERS {
            // Readable to the user as whom Kiln runs.
            let top = tempfile::Builder::new()
                .permissions(fs::Permissions::from_mode(0o755))
                .tempdir()
                .map_err(failed)?;
            for (path, text) in files {
                let path = top.path().join(path);
                let parent = path.parent().ok_or("a layer's file has no directory")?;
                fs::create_dir_all(parent).map_err(failed)?;
                fs::write(&path, text).map_err(failed)?;
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).map_err(failed)?;
            }
            let (from, tag) = (top.path().to_string_lossy().into_owned(), format!("studio/{name}"));
            kiln.output(["fs", "commit", "--from", &from, "--tag", &tag])?;
        }
        Ok(((), STACK.replace('+', " + ")))
    })
}

/// Two commands at the same path at the same time, each with a version of its own. One mount shows them both.
fn two_at_once(story: &mut Story, kiln: &Kiln, user: Option<&OrdinaryUser>, environment: &str) -> Outcome {
    story.step("two versions at once through the router: one mount, and each command sees its own", || {
        let failed = |error: std::io::Error| format!("cannot make a directory: {error}");
        let directory = match user {
            Some(user) => user.tempdir(),
            None => tempfile::tempdir().map_err(failed)?,
        };
        let at = directory.path().join("studio");
        fs::create_dir(&at).map_err(failed)?;
        if let Some(user) = user {
            std::os::unix::fs::chown(&at, Some(user.uid), Some(user.gid)).map_err(failed)?;
        }
        let at = at.to_string_lossy().into_owned();
        let start = |reference: &str| {
            let script =
                format!("for n in 1 2 3 4 5; do echo $(ls {at}/opt/renderer/plugins); sleep 0.1; done");
            let options = ["--backend", "router", "--at", &at];
            let words = [&["fs", "run", reference], &options[..], &["--", "sh", "-ec", &script]].concat();
            let mut command = kiln.command(words);
            command.stdout(Stdio::piped()).spawn().map_err(|error| format!("cannot run kiln: {error}"))
        };
        let versions = [(environment.to_owned(), "cloth\n"), (format!("{environment}~1"), "cloth hair\n")];
        let running = versions.each_ref().map(|(reference, _)| start(reference));
        for ((reference, seen), child) in versions.iter().zip(running) {
            let output =
                child?.wait_with_output().map_err(|error| format!("cannot wait for kiln: {error}"))?;
            let text = String::from_utf8_lossy(&output.stdout);
            if !output.status.success() || text != seen.repeat(5) {
                return Err(format!("{reference}: {}, and it saw {text:?}", output.status));
            }
        }
        let ended = kiln.output(["fs", "service", "stop"])?;
        Ok((
            (),
            format!("{ended}{}", versions.map(|(_, seen)| format!("plugins: {seen}")).concat().trim_end()),
        ))
    })
}
