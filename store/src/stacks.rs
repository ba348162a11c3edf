//! The layers of images, kept apart: a stack of hundreds is found by reading one file, and not one for each layer.
//!
//! ```text
//! renders/stacks/<sha256>     of what a name leads to: a manifest, an index, an image's id
//!                               `image sha256:…`   the id
//!                               `layer sha256:…`   a line for each, bottom first
//!                               `end`              without it the file was torn
//! ```
//!
//! Nothing is kept of images of which a part is not here. What is kept is true until a tar becomes another layer than before
//! or something is collected: then all of it goes.

use std::path::PathBuf;

use kiln_contract::Digest;

use crate::error::Context as _;
use crate::gc::digest_of_name;
use crate::staging::Staging;
use crate::tag::files_below;
use crate::{Result, Store};

/// What a view takes of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageStack {
    /// The image's id.
    pub image: Digest,
    /// Its layers, bottom first.
    pub layers: Vec<Digest>,
    /// Whether all of them came whole. Of another, files may come when they are asked for.
    pub whole: bool,
}

impl Store {
    /// Finds the layers of an image by what [`Store::resolve`] takes.
    ///
    /// # Errors
    /// As [`Store::resolve`].
    pub fn resolve_stack(&self, text: &str) -> Result<ImageStack> {
        self.resolve_by(text, |digest| self.stack(digest))
    }

    fn stack(&self, digest: &Digest) -> Result<Option<ImageStack>> {
        if let Some(kept) = self.kept_stack(digest) {
            return Ok(Some(kept));
        }
        let image = self.image(digest)?;
        let stack =
            image.map(|image| ImageStack { image: image.id, layers: image.layers, whole: image.whole });
        if let Some(stack) = stack.as_ref().filter(|stack| stack.whole) {
            // Where that fails, the next one takes as long as this one.
            let _ = self.keep_stack(digest, stack);
        }
        Ok(stack)
    }

    /// `None` too of an image that was removed.
    fn kept_stack(&self, digest: &Digest) -> Option<ImageStack> {
        let bytes = std::fs::read(self.layout.stack(digest)).ok()?;
        let stack = from_text(std::str::from_utf8(&bytes).ok()?)?;
        self.layout.image(&stack.image).exists().then_some(stack)
    }

    fn keep_stack(&self, digest: &Digest, stack: &ImageStack) -> Result<()> {
        let (directory, path) = (self.layout.stacks(), self.layout.stack(digest));
        std::fs::create_dir_all(&directory).doing("create", &directory)?;
        let staging = Staging::new(&self.layout)?;
        let new = staging.path("stack");
        std::fs::write(&new, to_text(stack)).doing("write", &new)?;
        std::fs::rename(&new, &path).doing("rename to", &path)
    }

    /// What is kept and is not what the images say, as far as they can be read.
    pub(crate) fn wrong_stacks(&self) -> Result<Vec<PathBuf>> {
        let directory = self.layout.stacks();
        if !directory.exists() {
            return Ok(Vec::new());
        }
        let mut wrong = files_below(&directory)?;
        wrong.retain(|path| {
            let Some(digest) = digest_of_name(path) else { return true };
            let Ok(Some(image)) = self.image(&digest) else { return false };
            self.kept_stack(&digest).is_none_or(|kept| kept.layers != image.layers)
        });
        Ok(wrong)
    }

    /// To be called when what is kept may not be true any more. All goes at once, whoever keeps more meanwhile.
    pub(crate) fn forget_stacks(&self) -> Result<()> {
        let (directory, staging) = (self.layout.stacks(), Staging::new(&self.layout)?);
        match std::fs::rename(&directory, staging.path("stacks")) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            moved => moved.doing("rename", &directory),
        }
    }
}

fn to_text(stack: &ImageStack) -> String {
    let layers = stack.layers.iter().map(|layer| format!("layer {layer}\n"));
    std::iter::once(format!("image {}\n", stack.image)).chain(layers).chain(["end\n".to_owned()]).collect()
}

fn from_text(text: &str) -> Option<ImageStack> {
    let mut lines = text.strip_suffix("end\n")?.lines();
    let image = lines.next()?.strip_prefix("image ")?.parse().ok()?;
    let layers = lines.map(|line| line.strip_prefix("layer ")?.parse().ok()).collect::<Option<_>>()?;
    Some(ImageStack { image, layers, whole: true })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ImportLimits;
    use kiln_contract::Home;
    use oci_spec::image::ImageConfiguration;

    fn image(store: &Store) -> ImageStack {
        let tar = tar::Builder::new(Vec::new()).into_inner().unwrap();
        let layer = store.import_tar(&tar[..], None, ImportLimits::default()).unwrap().layer;
        let image = store.make_image(&ImageConfiguration::default(), &[layer]).unwrap();
        ImageStack { image: image.id, layers: vec![layer], whole: true }
    }

    #[test]
    fn what_is_kept_is_what_was_said_and_nothing_torn_is_believed() {
        let stack = ImageStack { image: Digest::of(b"1"), layers: vec![Digest::of(b"2")], whole: true };
        let text = to_text(&stack);
        assert_eq!(from_text(&text), Some(stack));
        for length in 0..text.len() {
            assert_eq!(from_text(&text[..length]), None, "{length}");
        }
        assert_eq!(from_text(&text.replace("layer", "layers")), None);
    }

    #[test]
    fn the_layers_of_an_image_are_kept_until_something_changes() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&Home::at(dir.path())).unwrap();
        let expected = image(&store);
        let (id, path) = (expected.image.to_string(), store.layout.stack(&expected.image));
        for _ in 0..2 {
            assert_eq!(store.resolve_stack(&id).unwrap(), expected);
            assert!(path.exists());
        }
        assert_eq!(store.wrong_stacks().unwrap(), Vec::<PathBuf>::new());
        // It is this that is read.
        let other = ImageStack { layers: Vec::new(), ..expected.clone() };
        std::fs::write(&path, to_text(&other)).unwrap();
        assert_eq!(store.resolve_stack(&id).unwrap(), other);
        assert_eq!(store.wrong_stacks().unwrap(), std::slice::from_ref(&path));
        std::fs::write(&path, &to_text(&other)[..80]).unwrap();
        assert_eq!(store.resolve_stack(&id).unwrap(), expected);

        store.record_diff(&Digest::of(b"a tar"), &Digest::of(b"a layer")).unwrap();
        assert!(path.exists(), "a new tar changes nothing");
        store.record_diff(&Digest::of(b"a tar"), &Digest::of(b"another layer")).unwrap();
        assert!(!path.exists());
        assert_eq!(store.resolve_stack(&id).unwrap(), expected);

        store.forget_image(&expected.image).unwrap();
        assert!(store.resolve_stack(&id).is_err());
    }
}
