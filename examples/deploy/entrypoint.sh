#!/bin/sh
# A container's ENTRYPOINT: the command given to the container runs only on what was proven.
#
#   ENTRYPOINT ["/entrypoint.sh"]
#   CMD ["vllm", "serve", "/models/llama", "--tensor-parallel-size", "8"]
set -eu

: "${MODEL_DIR:?is not set, but should be the directory of the weights}"
: "${TP_SIZE:?is not set, but should be the degree that the server runs at}"
: "${TPCHECK_RECEIPT:?is not set, but should be the path of the receipt}"
: "${TPCHECK_PUBLIC_KEY:?is not set, but should be the path of the public key}"

tpcheck gate --verify "$TPCHECK_RECEIPT" --public-key "$TPCHECK_PUBLIC_KEY" \
    --model "$MODEL_DIR" --tp "$TP_SIZE"
exec "$@"
