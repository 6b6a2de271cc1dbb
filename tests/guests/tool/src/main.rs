//! Makes components of guests in languages that have no tool of their own for it, with the libraries behind `wit-bindgen` and `wasm-tools`, so that
//! neither has to be installed.
//!
//! - `guest-tool c-bindings WIT WORLD FOLDER` writes `WORLD.h`, `WORLD.c` and `WORLD_component_type.o`.
//! - `guest-tool component MODULE COMPONENT` wraps a core module that carries the type of its world, with the WASI adapter of the runtime's version.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use wasi_preview1_component_adapter_provider::{WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER};
use wit_bindgen_core::Files;
use wit_component::ComponentEncoder;
use wit_parser::Resolve;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["c-bindings", wit, world, folder] => c_bindings(Path::new(wit), world, Path::new(folder)),
        ["component", module, component] => make_component(Path::new(module), Path::new(component)),
        _ => bail!("usage: guest-tool c-bindings WIT WORLD FOLDER | guest-tool component MODULE COMPONENT"),
    }
}

fn c_bindings(wit: &Path, world: &str, folder: &Path) -> Result<()> {
    let mut resolve = Resolve::default();
    let (package, _) = resolve.push_path(wit).with_context(|| format!("{} does not parse", wit.display()))?;
    let world = resolve.select_world(&[package], Some(world))?;
    let mut files = Files::default();
    wit_bindgen_c::Opts::default().build().generate(&mut resolve, world, &mut files)?;
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    for (name, content) in files.iter() {
        let path = folder.join(name);
        fs::write(&path, content).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn make_component(module: &Path, component: &Path) -> Result<()> {
    let bytes = fs::read(module).with_context(|| module.display().to_string())?;
    let encoded = ComponentEncoder::default()
        .validate(true)
        .module(&bytes)
        .and_then(|encoder| encoder.adapter(WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER))
        .and_then(ComponentEncoder::encode)
        .with_context(|| format!("{} does not make a component", module.display()))?;
    fs::write(component, encoded).with_context(|| component.display().to_string())
}
