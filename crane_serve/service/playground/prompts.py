"""Example prompts of the playground. Texts of our own."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """language: as a BCP 47 tag; name: what its speakers call it."""

    language: str
    name: str
    prompts: tuple[str, ...]
    text: str  # whose loss can be looked at


EXAMPLES = (
    Example(
        "en",
        "English",
        ("The capital of France is", "In the morning the old fisherman went down to the"),
        "The old bridge across the river was closed last winter, and people now walk through the park to the market.",
    ),
    Example(
        "zh",
        "中文",
        ("长城是中国古代", "春天来了，公园里的花"),
        "河上的旧桥去年冬天关闭了，人们现在穿过公园走到市场去。",
    ),
    Example(
        "vi",
        "Tiếng Việt",
        ("Thủ đô của Việt Nam là", "Mỗi buổi sáng, bà tôi ra chợ mua"),
        "Cây cầu cũ bắc qua sông đã đóng cửa từ mùa đông năm ngoái, nên bây giờ mọi người đi bộ qua công viên ra chợ.",
    ),
)
