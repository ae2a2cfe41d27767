# mmpo-fast on NVIDIA's CUDA runtime: `docker build --tag mmpo-fast .`, then as docs/install.md says.
# `bash tools/check_jobs.sh` lints this file; no image is pulled there.

# The oldest Rust that builds the program (Cargo.toml), on a Debian whose C library is older than that of the image below.
FROM rust:1.89-bookworm AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-pip \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
# nvcc first and by itself: it is 300 MB, and changes more seldom than the sources.
COPY tools/setup_cuda.sh tools/setup_cuda.sh
RUN touch build.rs && sh tools/setup_cuda.sh
COPY . .
# The emulated device is for tests of the kernels.
RUN MMPO_FAST_CUDA=require MMPO_FAST_EMULATED=off cargo build --release --locked --bin mmpo-fast \
    && target/release/mmpo-fast man man1

# cuBLASLt is in the runtime image; the driver comes from the host.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
COPY --from=build /source/target/release/mmpo-fast /usr/local/bin/mmpo-fast
COPY --from=build /source/man1 /usr/local/share/man/man1
COPY --from=build /source/LICENSE /usr/local/share/doc/mmpo-fast/LICENSE
# A number above those of people on the host, so that files written by mistake are nobody's. Whoever is named with --user may keep
# reference log-probs too: the program believes only files of its own user.
RUN useradd --uid 10001 --user-group --create-home --shell /usr/sbin/nologin mmpo \
    && install --directory --owner=mmpo --group=mmpo /cache /cache/huggingface /runs \
    && install --directory --mode=1777 /cache/mmpo-fast
# Models and data sets of the Hugging Face Hub, and reference log-probs.
ENV HF_HOME=/cache/huggingface MMPO_FAST_CACHE=/cache/mmpo-fast
VOLUME ["/cache"]
# By its number, so that Kubernetes can tell that it is not root.
USER 10001:10001
WORKDIR /runs
ENTRYPOINT ["mmpo-fast"]
CMD ["doctor"]
