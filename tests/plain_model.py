"""Label Anything once more, one episode, one support, one pair at a time: what the packed model must equal.

Only the parameters are the model's; attention is always the plain MultiHead(Q, K, V), nothing is padded or masked.
"""

import torch
from torch.nn import functional as F

from la.model.label_anything import LabelAnything


def plain_logits(model: LabelAnything, episode, features, mask, size) -> torch.Tensor:
    """Logits (N + 1, 4h, 4w) of one episode in evaluation; the arguments are those of `la.episodes.batch.pack`."""
    encoder, slots = model.prompt_encoder, len(episode.classes) + 1
    grid = tuple(features([episode.query]).shape[1:3])
    place = encoder.position.grid(*grid)
    any_mask = any(p.masks for p in episode.pairs)
    any_sparse = any(p.points or p.boxes for p in episode.pairs)
    embeddings = {}
    for position, image_id in enumerate(episode.supports):
        image = model.neck(features([image_id]))[0]
        pairs = {0: None} | {1 + p.slot: p for p in episode.pairs if p.support == position}
        tokens = {slot: _tokens(encoder, pair, size(image_id), any_sparse) for slot, pair in pairs.items()}
        mixed = _block(encoder.exchange, torch.cat(list(tokens.values())))
        mixed = dict(zip(tokens, mixed.split([len(t) for t in tokens.values()]), strict=True))
        for slot, pair in pairs.items():
            if pair and pair.masks:
                drawn = encoder.mask_cnn(mask(image_id, pair.masks)[None, None].to(image.dtype))
                dense = F.interpolate(drawn, grid, mode="bilinear", align_corners=False)[0].flatten(1).T
            else:
                dense = (encoder.absent_mask if any_mask else encoder.no_mask).expand_as(image)
            sparse = mixed[slot]
            if encoder.pool is not None:
                dense, sparse = dense + encoder.pool.rows[slot], sparse + encoder.pool.rows[slot]
            embeddings[position, slot] = _fuse(model.fusion, image + dense, sparse, place).mean(0)
    return _decode(model, episode, features, place, _mix(model.mixer, embeddings, slots), grid)


def _tokens(encoder, pair, size, any_sparse):
    """(T, D) tokens of one pair's points and boxes."""
    height, width = size
    rows = []
    for x, y, label in pair.points if pair else ():
        rows.append(encoder.position(torch.tensor([x / width, y / height]).to(encoder.types)) + encoder.types[label])
    for x0, y0, x1, y1 in pair.boxes if pair else ():
        for (x, y), kind in (((x0, y0), 2), ((x1, y1), 3)):
            at = torch.tensor([x / width, y / height]).to(encoder.types)
            rows.append(encoder.position(at) + encoder.types[kind])
    return torch.stack(rows or [encoder.absent_point if any_sparse else encoder.no_sparse])


def _attend(attention, query, key, value):
    return attention(query[None], key[None], value[None])[0]


def _block(block, tokens):
    tokens = block.norm(tokens + _attend(block.attention, tokens, tokens, tokens))
    return tokens if block.mlp is None else block.norm(tokens + block.mlp(tokens))


def _two_way(transformer, tokens, image, place):
    first = tokens
    for number, layer in enumerate(transformer.layers):
        if number == 0:
            tokens = _attend(layer.self_attention, tokens, tokens, tokens)
        else:
            tokens = tokens + _attend(layer.self_attention, tokens + first, tokens + first, tokens)
        tokens = layer.norms[0](tokens)
        tokens = layer.norms[1](tokens + _attend(layer.token_to_image, tokens + first, image + place, image))
        tokens = layer.norms[2](tokens + layer.mlp(tokens))
        image = layer.norms[3](image + _attend(layer.image_to_token, image + place, tokens + first, tokens))
    seen = _attend(transformer.last_attention, tokens + first, image + place, image)
    return transformer.last_norm(tokens + seen), image


def _fuse(fusion, image, sparse, place):
    if hasattr(fusion, "transformer"):
        return _two_way(fusion.transformer, sparse, image, place)[1]
    (layer,) = fusion.layers
    placed = image + place
    sparse = layer.token_norm(sparse + _attend(layer.token_to_image, sparse, placed, placed))
    return layer.image_norm(image + _attend(layer.image_to_token, placed, sparse, sparse))


def _mix(mixer, embeddings, slots):
    """{(support, slot): (D,)} -> (slots, D)."""
    if mixer.block is not None:
        groups = [list(embeddings)] if mixer.jointly else [[k for k in embeddings if k[1] == c] for c in range(slots)]
        for keys in filter(None, groups):
            mixed = _block(mixer.block, torch.stack([embeddings[k] for k in keys]))
            embeddings |= dict(zip(keys, mixed, strict=True))
    of_class = [[e for (_, slot), e in embeddings.items() if slot == c] for c in range(slots)]
    zero = torch.zeros_like(next(iter(embeddings.values())))
    return torch.stack([torch.stack(found).mean(0) if found else zero for found in of_class])


def _decode(model, episode, features, place, prototypes, grid):
    decoder, query = model.decoder, model.neck(features([episode.query]))[0]
    if model.config.arch == "released":
        prototypes, query = _two_way(decoder.layers[0], prototypes, query, place)
    else:
        step = decoder.layers[0]
        query = step.image_norm(query + _attend(step.image_to_class, query, prototypes, prototypes))
        prototypes = step.class_norm(prototypes + _attend(step.class_to_image, prototypes, query, query))
    image = decoder.spatial_convs(decoder.upscaling(query.T.unflatten(1, grid)[None]))[0]
    return torch.einsum("dhw,cd->chw", image, decoder.class_mlp(prototypes))
