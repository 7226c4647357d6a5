"""Texts of many scripts."""

import random

TEXTS = [
    "The furnace is hot, and the alchemist waits for the gold to appear.\n",
    "丹炉里的火很旺，炼丹的人在等金子出现。今天天气很好，我们去散步吧。",
    "Печь горячая, и алхимик ждёт золота. Сегодня хорошая погода.",
    "الفرن ساخن والكيميائي ينتظر الذهب. الطقس جميل اليوم.",
    "def furnace(heat: float) -> float:\n    return heat * 2  # twice as hot\n",
    "かまどは熱く、錬金術師は金を待つ。今日はいい天気です。",
    "Naïve café, Übermaß, señor, Ångström, œuvre, façade; 1234567890 3.14159 €5 🔥🧪👩‍🔬\n\n\ttabs",
]


SCRIPTS = [
    (0x20, 0x7E), (0xA1, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF), (0x600, 0x6FF),
    (0x900, 0x97F), (0xE00, 0xE7F), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F),
    (0x300, 0x36F), (0x2000, 0x206F), (0x09, 0x0A),
]  # fmt: skip


def mixed_strings(count: int) -> list[str]:
    """Strings that change script every few characters, spaces and line ends among them."""
    chance = random.Random(7)
    strings = []
    for _ in range(count):
        runs = [chance.choice(SCRIPTS) for _ in range(chance.randint(1, 8))]
        strings.append(
            "".join(
                chance.choice(["", " ", "  ", "\n"])
                + "".join(chr(chance.randint(*run)) for _ in range(chance.randint(1, 12)))
                for run in runs
            )
        )
    return strings
